"""Exact places to die at, by name: `arm` makes this process SIGKILL itself when it gets to one.

A point is a call: of the toy engine, of the verifier, of the writer of metrics, or one of the system
calls under the storage, told apart by the file it is about. The numbers are those of the run of
`test_kill_points.py`: steps of two chunks and two updates, a checkpoint after every third step of
five to the epoch, the newest two of them kept. Nothing is timed: which call it is decides.
"""

import functools
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import toy_session
from toy_engine import ToyEngine

from rollforward.replay.metrics import MetricsFile
from rollforward.storage.local import OsFiles


@dataclass(frozen=True)
class Point:
    """Before, after or in the middle of the call of that number in one start of the run."""

    call: str
    """A method of ToyEngine, `verify`, `metrics`, or a method of OsFiles."""
    number: int = 1
    when: Literal["before", "half", "after"] = "before"
    file: str = ""
    """Of system calls: a regular expression for the path; of a rename, for the new one."""
    first_rank_only: bool = False


IN_A_STEP = {
    "in generation": Point("generate", 7),
    "in generation, the step's first chunk in the journal": Point("generate", 8),
    "in verification": Point("verify", 7),
    "in the reference's log-probabilities": Point("reference_logprobs", 7),
    "in the journal's write": Point("write", 3, "half", r"/1-0_3\.journal"),
    "before the journal's fsync": Point("fsync", 3, "before", r"/1-0_3\.journal"),
    "after the journal's fsync": Point("fsync", 3, "after", r"/1-0_3\.journal"),
    "before a new segment's header": Point("create", 1, "after", r"/1-0_3\.journal"),
    "in a new segment's header": Point("write", 1, "half", r"/1-0_3\.journal"),
    "in the update": Point("_step", 7, "half"),
    "after the update, before its outcome is recorded": Point("update", 7, "after"),
    "in the record of an outcome": Point("write", 4, "half", r"/1-0_3\.journal"),
    "between the write of an outcome and the next sync": Point("write", 4, "after", r"/1-0_3\.journal"),
    "in the second update of a step": Point("_step", 8, "half"),
    "after the second update, before its outcome is recorded": Point("update", 8, "after"),
    "before the reference is synchronised": Point("sync_reference", 2, "before"),
    "after the reference was synchronised": Point("sync_reference", 2, "after"),
    "before a step's metrics": Point("metrics", 4, "before", first_rank_only=True),
    "in the line of a step's metrics": Point("metrics", 4, "half", first_rank_only=True),
    "after a step's metrics": Point("metrics", 4, "after", first_rank_only=True),
    "in the epoch's last update": Point("_step", 10, "half"),
    "in the next epoch's first generation": Point("generate", 11),
}
"""Step 0_3, the fourth, while checkpoint 0_3 may still be on its way; and the end of epoch 0."""

IN_A_CHECKPOINT = {
    "in the first checkpoint of all": Point("fsync", 1, "before", r"/\.0_0\.json", first_rank_only=True),
    "in the background write": Point("write", 2, "half", r"policy_model_rank_\d-0_3\."),
    "in the background write of the optimizer": Point("write", 2, "half", r"optimizer_rank_\d-0_3\."),
    "before a tensor file's fsync": Point("fsync", 1, "before", r"policy_model_rank_\d-0_3\."),
    "before a tensor file's rename": Point("rename", 1, "before", r"policy_model_rank_\d-0_3\."),
    "between a tensor file's rename and the folder's sync": Point(
        "rename", 1, "after", r"policy_model_rank_\d-0_3\."
    ),
    "before a table is begun": Point("create", 1, "before", r"/\.table_rank_\d-0_3\."),
    "in a table's write": Point("write", 1, "half", r"/\.table_rank_\d-0_3\."),
    "before a table's fsync": Point("fsync", 1, "before", r"/\.table_rank_\d-0_3\."),
    "before a table's rename": Point("rename", 1, "before", r"/table_rank_\d-0_3\."),
    "between a table's rename and the folder's sync": Point("rename", 1, "after", r"/table_rank_\d-0_3\."),
    "when the first rank reads the tables": Point(
        "open_read", 1, "before", r"/table_rank_\d-0_3\.", first_rank_only=True
    ),
    "every part written, before the manifest": Point(
        "create", 1, "before", r"/\.0_3\.json", first_rank_only=True
    ),
    "in the manifest's write": Point("write", 1, "half", r"/\.0_3\.json", first_rank_only=True),
    "between the manifest's fsync and its rename": Point(
        "fsync", 1, "after", r"/\.0_3\.json", first_rank_only=True
    ),
    "between the manifest's rename and the folder's sync": Point(
        "rename", 1, "after", r"commits/0_3\.json", first_rank_only=True
    ),
    "between the manifest and meta.json": Point("create", 2, "before", r"train/rank_\d/\.meta\.json"),
    "in the write of meta.json": Point("write", 2, "half", r"train/rank_\d/\.meta\.json"),
    "between the policy's meta.json and the optimizer's": Point(
        "rename", 2, "before", r"optimizer/rank_\d/meta\.json"
    ),
    "after the run's last manifest": Point("rename", 1, "after", r"commits/1_3\.json", first_rank_only=True),
}
"""Checkpoint 0_3, written while step 0_3 generates; the second of the run."""

IN_PRUNING = {
    "before an old manifest goes": Point("unlink", 1, "before", r"commits/0_0\.json", first_rank_only=True),
    "between an old manifest and its folder's sync": Point(
        "unlink", 1, "after", r"commits/0_0\.json", first_rank_only=True
    ),
    "between an old manifest and its files": Point("unlink", 1, "before", r"policy_model_rank_\d-0_0\."),
    "between two old files": Point("unlink", 1, "before", r"optimizer_rank_\d-0_0\."),
    "before an old table goes": Point("unlink", 1, "before", r"/table_rank_\d-0_0\."),
    "before an old journal segment goes": Point("unlink", 1, "before", r"/1-0_0\.journal$"),
    "between two old journal segments": Point("unlink", 1, "after", r"/1-0_0\.journal$"),
}
"""What commit 1_1, the third checkpoint, lets go."""

IN_RECOVERY = {
    "before a table is read": Point("open_read", 1, "before", r"/table_rank_\d-\d_\d\."),
    "in restoring": Point("pread", 4, "after", r"optimizer_rank_0-\d_\d\.safetensors"),
    "before the torn end is copied aside": Point("create", 1, "before", r"\.1-0_3\.journal\.torn\."),
    "before the torn end is cut": Point("rename", 1, "before", r"/1-0_3\.journal$"),
    "after the torn end was cut": Point("rename", 1, "after", r"/1-0_3\.journal$"),
    "before the next incarnation's segment": Point("create", 1, "before", r"/2-0_\d\.journal"),
    "in the header of the next incarnation's segment": Point("write", 1, "half", r"/2-0_\d\.journal"),
    "before the metrics are cut back": Point("rename", 1, "before", r"/metrics\.jsonl", first_rank_only=True),
    "after the metrics were cut back": Point("rename", 1, "after", r"/metrics\.jsonl", first_rank_only=True),
    "in the first replayed update": Point("_step", 1, "half"),
    "in the second replayed update": Point("_step", 2, "half"),
    "between two replayed updates": Point("update", 1, "after"),
}
"""Of a start that resumes."""

IN_A_NEW_FOLDER = {
    "before the journal is copied": Point("create", 1, "before", r"/\.1-0_3\.journal\."),
    "in the copy of the journal": Point("write", 1, "half", r"/\.1-0_3\.journal\."),
    "after the journal was copied": Point("rename", 1, "after", r"/1-0_3\.journal$"),
    "before the new folder's first manifest": Point(
        "create", 1, "before", r"/\.0_\d\.json", first_rank_only=True
    ),
    "after the new folder's first manifest": Point(
        "rename", 1, "after", r"commits/0_\d\.json", first_rank_only=True
    ),
}
"""Of a start that goes on from another folder, until its own can be resumed by itself."""

POINTS = {**IN_A_STEP, **IN_A_CHECKPOINT, **IN_PRUNING, **IN_RECOVERY, **IN_A_NEW_FOLDER}


def arm(name: str, last_words: Callable[[], None]) -> None:
    """Die at the point of this name; `last_words` is called just before."""
    point = POINTS[name]
    owner, attribute = _place_of(point.call)
    original = getattr(owner, attribute)
    left = point.number

    @functools.wraps(original)
    def armed(*given: Any, **named: Any) -> Any:
        nonlocal left
        if point.file and not re.search(point.file, _file_of(given)):
            return original(*given)
        left -= 1
        if left != 0:
            return original(*given, **named)
        if point.when == "half":
            _half(original, given)
        elif point.when == "after":
            original(*given, **named)
        last_words()
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    setattr(owner, attribute, armed)


def _place_of(call: str) -> tuple[Any, str]:
    if call == "verify":
        return toy_session, "shortness"
    if call == "metrics":
        return MetricsFile, "append"
    return (ToyEngine if hasattr(ToyEngine, call) else OsFiles), call


def _file_of(given: tuple[Any, ...]) -> str:
    """The path that a system call is about, whether it was given one or a descriptor."""
    if isinstance(given[-1], str):
        return given[-1]
    return str(Path(f"/proc/self/fd/{given[1]}").readlink())


def _half(original: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """Half of what is written; of an optimizer's step, the first tensor and not the others."""
    if isinstance(given[1], dict):
        original(given[0], dict([*given[1].items()][:1]), *given[2:])
    else:
        original(*given[:-1], given[-1][: len(given[-1]) // 2])
