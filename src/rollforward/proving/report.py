"""What was found, as JSON: for programs, and kept as `proof.json`.

    verdict, reason              "equal", "different" or "not tried"; why, where there is nothing to compare
    causes                       name and text of each, the most telling first
    notes                        what else there is to know, for people
    command, resume_args, seed   what was run; no seed where kills follow lines of output
    first_difference             series, step and fields of the first step at which the log differs, or null
    compared, noise              the undisturbed run with the killed one and, with --twice, with a second one
    runs                         the folder of each, its starts and its kills

Numbers that JSON does not have (infinity, NaN) are strings.
"""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollforward.proving.comparing import Compared
from rollforward.proving.proof import Proof
from rollforward.proving.trial import Trial


def as_json(proof: Proof) -> dict[str, Any]:
    """A proof as a JSON object."""
    plan = proof.plan
    value = {
        "verdict": str(proof.verdict),
        "reason": proof.reason,
        "causes": [asdict(cause) for cause in proof.causes],
        "notes": proof.notes,
        "command": plan.command.words,
        "resume_args": plan.command.resume_args,
        "seed": None if plan.kill_after else plan.seed,
        "first_difference": _first(proof.compared),
        "compared": _compared(proof.compared),
        "noise": _compared(proof.noise),
        "runs": [_run(trial) for trial in proof.trials],
    }
    plain: dict[str, Any] = _plain(value)
    return plain


def _first(compared: Compared | None) -> dict[str, Any] | None:
    first = None if compared is None else compared.first
    if first is None or not first.differences:
        return None
    step = first.differences[0].step
    fields = [item.name for item in first.differences if item.step == step]
    return {"series": first.path, "step": step, "fields": fields}


def _compared(compared: Compared | None) -> dict[str, Any] | None:
    if compared is None:
        return None
    tensors = compared.tensors
    return {
        "checkpoints": tensors.checkpoints,
        "tensors": len(tensors.names),
        "tensor_differences": [asdict(item) for item in tensors.differences],
        "series": [asdict(one) for one in compared.series],
        "not_compared": tensors.skipped,
    }


def _run(trial: Trial) -> dict[str, Any]:
    starts = [asdict(start) | {"place": start.place and str(start.place)} for start in trial.starts]
    kills = [asdict(kill) for kill in trial.kills]
    return {"name": trial.name, "folder": trial.folder, "starts": starts, "kills": kills}


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {str(key): _plain(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return str(value)
    return str(value) if isinstance(value, Path | re.Pattern) else value
