"""Every exception that Rollforward raises on purpose.

    RollforwardError                 exit code 1
    ├── InputError                   exit code 2: the user's input; nothing was changed on disk
    │   ├── ConfigError              a key or value of the configuration
    │   ├── DataError                a dataset, a prompt, a tokenizer
    │   ├── ModelError               a model folder that cannot be used
    │   ├── NothingToResume          no checkpoint where one was asked for
    │   ├── CheckpointMismatch       an intact checkpoint, but of another model, layout or run
    │   └── RunExists                a new run asked for in a folder that holds one
    ├── CheckpointInvalid            a checkpoint that does not prove intact; an older one is tried
    │   └── CheckpointUnreadable     it could not be read this time: nothing is known of its bytes
    ├── StorageError                 the disk: full, read-only, failing
    ├── RunLocked                    another trainer holds the folder
    ├── VerifierError                a reward function raised, or returned something else
    ├── NonFinite                    a loss, gradient norm, reward or log-probability that is not a number
    ├── ReplayDiverged               a replayed update did not repeat the recorded one
    ├── EngineError                  the framework could not do what was asked
    │   └── DeviceUnavailable        it does not have the device that is to compute
    ├── CollectiveTimeout            a worker did not come to where the others wait for it
    └── WorkerFailed                 a worker process died

Each says what went wrong and where, why, and what to try. `str()` gives all of it, a line each.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class RollforwardError(Exception):
    """The root: what and where in `message`, what to do about it in `hint`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nTry: {self.hint}" if self.hint else self.message


class InputError(RollforwardError):
    """What the user gave cannot be used. Nothing on disk was changed."""

    exit_code = 2


class ConfigError(InputError):
    """An unknown key, a value of the wrong type or out of range."""


class DataError(InputError):
    """A dataset that is missing, empty or malformed; a prompt too long; a tokenizer that does not fit."""


class ModelError(InputError):
    """A model folder with a missing file, an unsupported family, or tensors that do not fit its config."""


class NothingToResume(InputError):
    """No usable checkpoint: the message says what was looked for and where, rank by rank."""


class CheckpointMismatch(InputError):
    """An intact checkpoint that does not belong to this model, worker count or run."""


class RunExists(InputError):
    """A new run was asked for in a folder that already holds checkpoints."""


class CheckpointInvalid(RollforwardError):
    """A checkpoint is damaged or incomplete. The reason fits one line."""


class CheckpointUnreadable(CheckpointInvalid):
    """A file of it could not be read this time, which proves nothing about it.

    An older checkpoint may be resumed from; nothing may be deleted for it.
    """


class StorageError(RollforwardError):
    """An operation on the disk failed: which, on what, and why."""

    settled = False
    """Whether the error says what is there (nothing, a folder, a link, a file too large), so that asking
    again gives the same answer. Any other may be gone at the next try, and proves nothing."""


class RunLocked(RollforwardError):
    """Another trainer holds the run's folder; the message says who."""


class VerifierError(RollforwardError):
    """A verifier raised, or returned the wrong number or kind of rewards."""


class NonFinite(RollforwardError):
    """A loss, gradient norm, reward or log-probability is NaN or infinite; the message says of which samples.

    `samples` are the rows at fault, of those that were computed on; `facts` (for JSON) and `arrays` (by
    name) are what was computed. The trainer puts what it knows besides into `evidence`.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        samples: Sequence[int] = (),
        facts: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.samples = tuple(samples)
        self.facts = dict(facts or {})
        self.arrays = dict(arrays or {})
        self.evidence: Any = None
        """See `grpo.evidence`."""


class ReplayDiverged(RollforwardError):
    """A replayed update gave other bits than the journal recorded."""


class EngineError(RollforwardError):
    """The engine or its framework could not do what was asked."""


class DeviceUnavailable(EngineError):
    """The framework that is installed cannot compute on this device; it will not the next time either."""


class CollectiveTimeout(RollforwardError):
    """A worker did not come to a collective in time; the message says which, and what it is at."""


class WorkerFailed(RollforwardError):
    """A worker process ended with an error."""
