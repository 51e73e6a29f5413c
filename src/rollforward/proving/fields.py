"""What a field of a trainer's log is about, from the words in its name.

Names are those that trainers use: `lr`, `train/learning_rate`, `rewards/accuracy/mean`, `kl`,
`seconds/generate`.
"""

import re
from enum import Enum


class Kind(Enum):
    """What a field is about. Their order is that in which causes go before effects within a step."""

    RATE = "the learning rate"
    DATA = "the data"
    ROLLOUTS = "what was sampled"
    REFERENCE = "the reference model"
    LOSS = "the loss"
    COUNTER = "a counter"


_WORDS: dict[Kind, frozenset[str]] = {
    Kind.RATE: frozenset({"lr", "lrs"}),
    Kind.REFERENCE: frozenset({"kl", "ref", "reference"}),
    Kind.ROLLOUTS: frozenset(
        {"reward", "rewards", "completion", "completions", "advantage", "advantages", "entropy", "answer"}
        | {"answers", "response", "responses", "rollout", "rollouts", "length", "lengths"}
    ),
    Kind.DATA: frozenset(
        {"data", "id", "ids", "index", "indices", "idx", "prompt", "prompts", "sample", "samples", "example"}
        | {"examples", "batch", "question", "questions", "input", "inputs", "text", "texts"}
    ),
    Kind.COUNTER: frozenset({"epoch", "epochs", "tokens", "flos"}),
}
_NOT_COMPARED = frozenset(
    {"time", "times", "seconds", "second", "secs", "sec", "ms", "runtime", "duration", "elapsed", "eta"}
    | {"timestamp", "clock", "wall", "walltime", "date", "datetime", "throughput", "tps", "memory", "mem"}
    | {"path", "paths", "dir", "folder", "host", "hostname", "pid", "gpu", "cpu", "uuid"}
    | {"incarnation", "restarts", "replayed", "saves"}
)
"""Words of fields about time, the machine and the starts of a run, which no two runs have in common."""
_NAMES_NOT_COMPARED = frozenset({"start", "started", "run", "run_id"})


def kind_of(name: str) -> Kind | None:
    """What a field is about; None for one that is not compared."""
    lower = name.lower()
    words = set(re.split(r"[^a-z0-9]+", lower))
    if words & _NOT_COMPARED or lower in _NAMES_NOT_COMPARED:
        return None
    if "learning_rate" in lower:
        return Kind.RATE
    return next((kind for kind, known in _WORDS.items() if words & known), Kind.LOSS)
