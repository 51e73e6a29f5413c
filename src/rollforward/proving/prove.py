"""A trainer is put to the proof: it is run in peace and run with kills, and what both left is compared.

    DIR/undisturbed    the run in peace
    DIR/again          another one, with `--twice`: what differs between these two is not the resume's fault
    DIR/killed         the run that is killed and started again
    DIR/proof.json     what was found

`prove` is for programs too: it takes a `Plan` and returns a `Proof`, and prints nothing.
"""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace

from rollforward.errors import ConfigError
from rollforward.inputs import open_input
from rollforward.inspection.folder import new_folder
from rollforward.proving.causes import Cause, Evidence, Resume, group_of, name_causes
from rollforward.proving.comparing import Compared, compare
from rollforward.proving.leavings import Leavings, Numbers, look_at
from rollforward.proving.moments import draw_moments
from rollforward.proving.notes import notes_on_kills, notes_on_logs, notes_on_noise
from rollforward.proving.proof import Plan, Proof, Verdict
from rollforward.proving.report import as_json
from rollforward.proving.series import SeriesCompared
from rollforward.proving.starting import AfterLine, AfterSeconds, KillPlace
from rollforward.proving.trial import OUT, Command, Trial, run_trial

REPORT = "proof.json"
_TAIL_LINES, _TAIL_BYTES = 15, 1 << 14
_TIMES, _SECONDS = 3.0, 60.0
"""Without a timeout, a start may take this many times as long as the run in peace, and this much more."""


def prove(plan: Plan, say: Callable[[str], None] = lambda _: None) -> Proof:
    """Run the trainer in peace and with kills, and compare.

    `say` is told what happens when it happens. InputError when the plan cannot be carried out, or the command
    cannot be started.
    """
    if not any(OUT in word for word in plan.command.words):
        raise ConfigError(
            f"the command has no {OUT} in it, so all runs would write to the same folder",
            hint=f"write {OUT} where the trainer's output folder goes; `env NAME={OUT} ...` sets a variable",
        )
    if OUT not in (program := plan.command.words[0]) and shutil.which(program) is None:
        raise ConfigError(f"{program}: no such command", hint="check its spelling, and $PATH")
    storage = new_folder(plan.out)
    proof = Proof(plan=plan)
    _carry_out(proof, say)
    storage.write(REPORT, [json.dumps(as_json(proof), indent=1).encode() + b"\n"])
    return proof


def _carry_out(proof: Proof, say: Callable[[str], None]) -> None:
    plan = proof.plan
    peace = _in_peace("undisturbed", proof, plan.timeout, say)
    limit = plan.timeout or _TIMES * peace.starts[0].seconds + _SECONDS
    twin = _in_peace("again", proof, limit, say) if plan.twice and not proof.reason else None
    if proof.reason:
        return
    left = look_at(peace.folder, plan.compare)
    command, places = _kills(plan, [peace] if twin is None else [peace, twin])
    killed = run_trial(
        "killed",
        plan.out / "killed",
        command,
        places=places,
        limit=limit,
        can_be_saved=left.saved,
        say=say,
    )
    proof.trials.append(killed)
    proof.notes += notes_on_kills(killed, planned=len(places))
    if killed.failure:
        proof.reason = killed.failure + _tail(killed)
        # Without a kill before, it says nothing about resuming.
        proof.verdict = Verdict.DIFFERENT if killed.kills else Verdict.NOT_TRIED
    elif not killed.kills:
        proof.reason = "no kill took place: the run came to its end before"
    else:
        if twin is not None:
            proof.noise = compare(left, look_at(twin.folder, plan.compare))
            proof.notes += notes_on_noise(proof.noise)
        _judge(proof, left, look_at(killed.folder, plan.compare))


def _in_peace(name: str, proof: Proof, limit: float | None, say: Callable[[str], None]) -> Trial:
    plan = proof.plan
    trial = run_trial(name, plan.out / name, plan.command, limit=limit, say=say)
    proof.trials.append(trial)
    if trial.failure:
        proof.reason = f"the undisturbed run failed: {trial.failure}{_tail(trial)}"
    return trial


def _kills(plan: Plan, undisturbed: Sequence[Trial]) -> tuple[Command, Sequence[KillPlace]]:
    """Where the kills come, and the command, with what its starts begin with."""
    if plan.kill_after:
        return plan.command, [AfterLine(pattern) for pattern in plan.kill_after]
    starts = [trial.starts[0] for trial in undisturbed]
    shortest = min(start.seconds - (start.begun or 0.0) for start in starts)
    moments = draw_moments(random.Random(plan.seed), plan.kills, shortest)
    # A start that never begins would never be killed.
    never = any(start.begun is None for start in starts)
    command = replace(plan.command, begin=None) if never else plan.command
    return command, [AfterSeconds(moment) for moment in moments]


def _judge(proof: Proof, left: Leavings, right: Leavings) -> None:
    compared = proof.compared = compare(left, right, proof.noise)
    proof.notes += notes_on_logs(compared)
    if not compared.anything:
        proof.reason = f"there is nothing to compare in {left.folder}: no tensors and no series of steps"
    elif compared.differs:
        proof.verdict = Verdict.DIFFERENT
        proof.causes = _causes(compared, left, right, proof.trials[-1])
    elif not any(kill.resumes for kill in proof.trials[-1].kills):
        proof.reason = "no start resumed: every kill came before anything was saved"
    else:
        proof.verdict = Verdict.EQUAL


def _causes(compared: Compared, left: Leavings, right: Leavings, killed: Trial) -> list[Cause]:
    """From the series in which the runs part first."""
    chosen = compared.first or next(iter(compared.series), SeriesCompared(path=""))
    a, b = (side.read(chosen.path) for side in (left, right))
    rows = killed.first_rows.get(chosen.path) or [None] * len(killed.kills)
    resumes = [
        Resume(checkpoint=_step_of(kill.checkpoint), first=row)
        for kill, row in zip(killed.kills, rows, strict=True)
    ]
    return name_causes(
        Evidence(
            compared=chosen,
            a=a,
            b=b,
            resumes=resumes,
            last_checkpoint=_step_of(left.newest),
            differing={group_of(item.role, item.name) for item in compared.tensors.differences},
            saved={group_of(role, name) for role, name in compared.tensors.names},
        )
    )


def _step_of(checkpoint: Numbers) -> int | None:
    return checkpoint[0] if len(checkpoint) == 1 else None


def _tail(trial: Trial) -> str:
    """The end of the last start's output."""
    log = trial.starts[-1].log
    with open_input(log) as file:
        file.seek(max(file.seek(0, 2) - _TAIL_BYTES, 0))
        lines = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    shown = [f"  | {line}" for line in lines] or ["  | (no output)"]
    return "\n".join(["", *shown, f"  all of it: {log}"])
