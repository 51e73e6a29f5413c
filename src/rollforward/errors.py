"""Every exception that Rollforward raises on purpose.

    RollforwardError                 exit code 1
    ├── InputError                   exit code 2: the user's input; nothing was changed on disk
    │   ├── ConfigError              a key or value of the configuration
    │   ├── DataError                a dataset, a prompt, a tokenizer
    │   ├── ModelError               a model folder that cannot be used
    │   ├── NothingToResume          no checkpoint where one was requested
    │   ├── CheckpointMismatch       an intact checkpoint, but for another model, layout or run
    │   └── RunExists                a new run requested in a folder that already holds one
    ├── CheckpointInvalid            a checkpoint that is not intact; an older one is tried
    │   └── CheckpointUnreadable     it could not be read this time: nothing is known about its bytes
    ├── StorageError                 the disk: full, read-only, failing
    ├── RunLocked                    another trainer holds the folder
    ├── VerifierError                a reward function raised, or returned something else
    ├── NonFinite                    a loss, gradient norm, reward or log-probability that is not a number
    ├── ReplayDiverged               a replayed update did not reproduce the recorded one
    ├── EngineError                  the framework could not do what was requested
    │   └── DeviceUnavailable        it cannot use the requested device
    ├── CollectiveTimeout            a worker did not reach a collective that the others wait in
    └── WorkerFailed                 a worker process died

Each says what went wrong and where, why, and what to try. `str()` gives all of it, one line each.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class RollforwardError(Exception):
    """The base class: what went wrong and where in `message`, what to do about it in `hint`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nTry: {self.hint}" if self.hint else self.message


class InputError(RollforwardError):
    """The user's input cannot be used. Nothing on disk was changed."""

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
    """A new run was requested in a folder that already holds checkpoints."""


class CheckpointInvalid(RollforwardError):
    """A checkpoint is damaged or incomplete. The reason fits one line."""


class CheckpointUnreadable(CheckpointInvalid):
    """One of its files could not be read this time, which proves nothing about the checkpoint.

    The run may resume from an older checkpoint; nothing may be deleted because of this.
    """


class StorageError(RollforwardError):
    """A disk operation failed; the message says which, on what, and why."""

    settled = False
    """Whether the error says what is there (nothing, a folder, a link, a file too large), so that a retry
    gives the same answer. Any other error may be gone on the next try, and proves nothing."""


class RunLocked(RollforwardError):
    """Another trainer holds the run's folder; the message says who."""


class VerifierError(RollforwardError):
    """A verifier raised, or returned the wrong number or kind of rewards."""


class NonFinite(RollforwardError):
    """A loss, gradient norm, reward or log-probability is NaN or infinite; the message names the samples.

    `samples` are the faulty rows of the computed batch; `facts` (for JSON) and `arrays` (by name) are
    what was computed. The trainer adds what else it knows in `evidence`.
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
        """See `grpo.nonfinite`."""


class ReplayDiverged(RollforwardError):
    """A replayed update gave different bits from those in the journal."""


class EngineError(RollforwardError):
    """The engine or its framework could not do what was requested."""


class DeviceUnavailable(EngineError):
    """The installed framework cannot compute on this device; retrying will not help."""


class CollectiveTimeout(RollforwardError):
    """A worker did not reach a collective in time; the message says which, and what it is doing."""


class StandbyOutdated(RollforwardError):
    """What a standby read when it was started is not what is there when it is to take over."""


class WorkerFailed(RollforwardError):
    """A worker process ended with an error."""
