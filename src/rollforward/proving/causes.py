"""From where two runs part to what was not restored.

A log says more than that two runs differ. What differs first, and how long after the resume, tells the
classic mistakes apart, because within a step causes go before effects: the learning rate and the data are
chosen, then completions are sampled, then the loss is computed, and only the update after it uses the
optimizer's state.

Pure functions over what was compared. They say what the evidence points to; they cannot look into the
trainer.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rollforward.proving.fields import Kind, kind_of
from rollforward.proving.series import Row, Series, SeriesCompared, Step, told, told_steps
from rollforward.wording import counted


class Group(StrEnum):
    """What a tensor of a checkpoint belongs to."""

    RANDOM = "the random state"
    SCHEDULE = "the schedule"
    REFERENCE = "the reference model"
    OPTIMIZER = "the optimizer's state"
    WEIGHTS = "the weights"


_GROUPS = {
    Group.RANDOM: re.compile(r"(^|[^a-z])(rng|random|generator|seed)"),
    Group.SCHEDULE: re.compile(r"(^|[^a-z])(lr_?)?sched"),
    Group.OPTIMIZER: re.compile(r"optim|(^|[^a-z])(adam|momentum|moments?|exp_avg|velocity)"),
    Group.REFERENCE: re.compile(r"(^|[^a-z])ref(erence)?([^a-z]|$)"),
}


@dataclass(frozen=True)
class Cause:
    """What the evidence points to."""

    name: str
    """For programs: one of a few words, joined by underscores."""
    text: str
    """For people: one sentence."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A start after a kill."""

    checkpoint: int | None
    """The step of the newest checkpoint that it found; None when there was none, or none with a step."""
    first: Row | None
    """The row that it logged first."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known about the run that was killed, compared with the undisturbed one."""

    compared: SeriesCompared
    """The series in which they part first; it may have no differences."""
    a: Series
    """Of the undisturbed run."""
    b: Series
    resumes: Sequence[Resume] = ()
    last_checkpoint: int | None = None
    """The step of the undisturbed run's newest checkpoint."""
    differing: Collection[Group] = field(default=())
    """What the tensors belong to that differ in the newest checkpoints."""
    saved: Collection[Group] = field(default=())
    """What the tensors belong to that the newest checkpoint holds."""


def group_of(role: str, name: str) -> Group:
    """What a tensor belongs to, from the names of its file or role and its own."""
    text = f"{role}/{name}".lower()
    return next((group for group, words in _GROUPS.items() if words.search(text)), Group.WEIGHTS)


def name_causes(evidence: Evidence) -> list[Cause]:
    """What the evidence points to, the most telling first. For runs that differ."""
    steps = _lost_steps(evidence) or _steps_not_logged(evidence)
    if evidence.compared.extra:
        steps.append(_steps_too_many(evidence))
    if steps:
        return steps
    if evidence.compared.differences:
        return _from_the_log(evidence)
    return [_from_the_tensors_alone(evidence.differing)] if evidence.differing else []


def _lost_steps(evidence: Evidence) -> list[Cause]:
    """Steps after the newest checkpoint that a start did not do again.

    Where the numbers of checkpoints are those of steps: that of the undisturbed run's last checkpoint says
    so.
    """
    order = list(evidence.a.by_step)
    if evidence.last_checkpoint is None or not order or len(order[-1]) != 1:
        return []
    ahead = evidence.last_checkpoint - order[-1][0]  # 0 where steps count from 1, and 1 where from 0
    if ahead not in (0, 1):
        return []
    for number, resume in enumerate(evidence.resumes, start=1):
        first = None if resume.first is None else evidence.b.step(resume.first)
        if resume.checkpoint is None or first not in order:
            continue
        expected = (resume.checkpoint + 1 - ahead,)
        if expected in order and order.index(expected) < order.index(first):
            lost = order[order.index(expected) : order.index(first)]
            where = ", where an epoch begins" if first in epoch_starts(evidence.a) else ""
            return [
                Cause(
                    "steps_skipped",
                    f"after kill {number} the newest checkpoint was of step {resume.checkpoint}, and the "
                    f"trainer continued at {told(first)}{where}: {told_steps(lost)} {_were(lost)} skipped",
                )
            ]
    return []


def _steps_not_logged(evidence: Evidence) -> list[Cause]:
    missing = evidence.compared.missing
    if not missing or (evidence.saved and not evidence.differing):
        return []
    order, starts = list(evidence.a.by_step), epoch_starts(evidence.a)
    behind = order.index(missing[-1]) + 1
    at_epoch = missing[0] in starts or (behind < len(order) and order[behind] in starts)
    where = ", up to where an epoch begins or ends" if at_epoch else ""
    return [Cause("steps_skipped", f"{told_steps(missing)} {_were(missing)} skipped{where}")]


def _steps_too_many(evidence: Evidence) -> Cause:
    extra = told_steps(evidence.compared.extra)
    found = [resume.checkpoint for resume in evidence.resumes if resume.checkpoint is not None]
    if evidence.last_checkpoint is not None and any(number >= evidence.last_checkpoint for number in found):
        return Cause("trains_on", f"a start that resumed the finished run trained on: only it did {extra}")
    return Cause("steps_too_many", f"only the killed run did {extra}: the count of steps is not restored")


def _from_the_log(evidence: Evidence) -> list[Cause]:
    """From the fields that differ at the first step at which any does."""
    differences = evidence.compared.differences
    first, order = differences[0].step, list(evidence.a.by_step)
    fields: dict[Kind, list[str]] = {}
    for item in differences:
        kind = kind_of(item.name)
        if item.step == first and kind is not None:
            fields.setdefault(kind, []).append(item.name)
    steps = [evidence.b.step(one.first) for one in evidence.resumes if one.first is not None]
    resumed = [order.index(step) for step in steps if step in order]
    at = order.index(first)
    since = max((index for index in resumed if index <= at), default=None)
    if since is None:
        return [
            Cause(
                "not_deterministic",
                f"{_listed(fields)} differ{_s(fields)} at {told(first)}, before any resume: the trainer does "
                "not repeat itself even undisturbed (--twice measures by how much)",
            )
        ]
    until = min((index for index in resumed if index > since), default=len(order))
    nth = {0: "the first step", 1: "the second step"}.get(at - since, f"step {at - since + 1}")
    differs = f"{_listed(fields)} differ{_s(fields)} first, at {told(first)}, {nth} after a resume"
    given = [kind for kind in (Kind.RATE, Kind.DATA) if kind in fields]
    if given:
        return [_given(kind, fields[kind][0], evidence, range(since, until), differs) for kind in given]
    return [_computed(set(fields), evidence, differs, late=at - since, first=first)]


def _given(kind: Kind, name: str, evidence: Evidence, steps: range, differs: str) -> Cause:
    """The learning rate or the data are others: perhaps those of other steps."""
    a = [rows[-1].get(name) for rows in evidence.a.by_step.values()]
    b = {step: rows[-1].get(name) for step, rows in evidence.b.by_step.items()}
    shift = find_shift(a, [b.get(step) for step in evidence.a.by_step], steps)
    if kind is Kind.RATE:
        return Cause("learning_rate", f"{differs}: {_rates_shift(shift, steps.start)}")
    return Cause("data_order", f"{differs}: {_datas_shift(shift, steps.start, _epoch_length(evidence.a))}")


def _rates_shift(shift: int | None, resumed: int) -> str:
    if shift is None:
        return "the schedule is not restored"
    if shift == -resumed:
        return "the schedule starts from the beginning"
    if shift > 0:
        return f"the schedule is {counted(shift, 'step')} ahead, advanced again for steps that were done"
    return f"the schedule is {counted(-shift, 'step')} behind"


def _datas_shift(shift: int | None, resumed: int, epoch: int) -> str:
    if shift is None:
        return "the order of the data is not restored"
    if shift == -resumed:
        return "the data start from the beginning"
    if shift > 0:
        return f"the data of {counted(shift, 'step')} are skipped"
    if epoch and shift % epoch == 0:
        return f"the data are those of {counted(-shift // epoch, 'epoch')} before: the epoch is not restored"
    return f"the data of {counted(-shift, 'step')} come again"


def _computed(kinds: set[Kind], evidence: Evidence, differs: str, *, late: int, first: Step) -> Cause:
    """The data and the learning rate are the same, as far as they are logged; what is computed differs."""
    logged = {kind_of(name) for name in evidence.compared.fields}
    same = " and ".join(kind.value for kind in (Kind.DATA, Kind.RATE) if kind in logged)
    differs += f", with {same} the same" if same else ""
    later = " of a later epoch" if any(step <= first for step in epoch_starts(evidence.a)) else ""
    order = "" if Kind.DATA in logged else f"the order of the data{later} (which is not logged), "
    if kinds == {Kind.COUNTER}:
        return Cause("counter", f"{differs}: a counter is not restored")
    weights_are_right = Kind.LOSS not in kinds or (Kind.ROLLOUTS in logged and Kind.ROLLOUTS not in kinds)
    if Kind.REFERENCE in kinds and weights_are_right:
        return Cause(
            "reference", f"{differs}: the reference model{_lacks(evidence, Group.REFERENCE)} is not restored"
        )
    if late == 0:
        random = f"the random state{_lacks(evidence, Group.RANDOM)}"
        return Cause("random_state", f"{differs}: {order}{random} or the weights are not restored")
    if first in epoch_starts(evidence.a):
        return Cause(
            "epoch_boundary",
            f"{differs}, where an epoch begins: {order}what changes with the epoch is not restored",
        )
    if late == 1:
        state = f"the optimizer's state{_lacks(evidence, Group.OPTIMIZER)}"
        return Cause("optimizer", f"{differs}, and the step before was the same: {state} is not restored")
    return Cause(
        "later",
        f"{differs}, and the steps between were the same: {order}something that acts seldom is not restored, "
        "such as a buffer, or a model that is synchronised from time to time",
    )


def _lacks(evidence: Evidence, group: Group) -> str:
    return "" if group in evidence.saved else " (of which the checkpoint has nothing)"


def _from_the_tensors_alone(differing: Collection[Group]) -> Cause:
    """Nothing that was logged differs."""
    named = " and ".join(group for group in Group if group in differing)
    names = {
        Group.RANDOM: "random_state",
        Group.SCHEDULE: "learning_rate",
        Group.REFERENCE: "reference",
        Group.OPTIMIZER: "optimizer",
        Group.WEIGHTS: "weights",
    }
    name = names[next(iter(differing))] if len(set(differing)) == 1 else "tensors"
    return Cause(name, f"nothing that was logged differs; in the newest checkpoint, {named} do")


def find_shift(a: Sequence[Any], b: Sequence[Any], steps: range) -> int | None:
    """The k nearest to 0 for which `b[i] == a[i + k]` at these steps; None when there is none.

    At least two values have to say so, and they must not all be the same.
    """
    for shift in sorted(range(-len(a) + 1, len(a)), key=abs):
        inside = range(max(steps.start, -shift), min(steps.stop, len(a) - shift))
        if shift and all(b[i] == a[i + shift] for i in inside) and len({repr(b[i]) for i in inside}) > 1:
            return shift
    return None


def epoch_starts(series: Series) -> set[Step]:
    """The first step of each epoch but the first, from a logged `epoch`.

    A fraction counts the step itself: it is a whole number at an epoch's last step.
    """
    found: set[Step] = set()
    before: int | None = None
    for row in series.rows:
        epoch = row.get("epoch")
        if isinstance(epoch, int | float):
            now = epoch if isinstance(epoch, int) else math.ceil(epoch) - 1
            if before is not None and now > before:
                found.add(series.step(row))
            before = now
    return found


def _epoch_length(series: Series) -> int:
    """Steps of the first epoch; 0 when there is one epoch only."""
    starts = epoch_starts(series)
    return next((at for at, step in enumerate(series.by_step) if step in starts), 0)


def _listed(fields: Mapping[Kind, list[str]]) -> str:
    names = [name for kind in Kind for name in fields.get(kind, [])]
    more = [f"{len(names) - 4} more"] if len(names) > 4 else []
    *most, last = [*names[:4], *more]
    return f"{', '.join(most)} and {last}" if most else last


def _s(fields: Mapping[Kind, list[str]]) -> str:
    return "s" if sum(map(len, fields.values())) == 1 else ""


def _were(steps: Sequence[Step]) -> str:
    return "was" if len(steps) == 1 else "were"
