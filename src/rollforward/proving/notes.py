"""What a reader has to know besides the verdict: what the kills met, what was done again, the noise."""

from rollforward.proving.comparing import Compared
from rollforward.proving.series import told_steps
from rollforward.proving.trial import Trial
from rollforward.wording import counted

_MOST_FILES = 5
"""How many files that were not compared are named."""


def notes_on_kills(killed: Trial, *, planned: int) -> list[str]:
    """About the kills and the starts after them."""
    notes = []
    if len(killed.kills) < planned and not killed.failure:
        rest = planned - len(killed.kills)
        notes.append(f"{counted(rest, 'kill')} of {planned} did not take place: the run ended before")
    for kill in killed.kills:
        if not kill.resumes:
            notes.append(
                f"kill {kill.start} came before anything was saved: start {kill.start + 1} began anew"
            )
    notes += [f"start {number} was to resume, and began anew" for number in killed.began_anew]
    for start in killed.starts:
        if start.left:
            notes.append(f"start {start.number} left behind, and it was ended: {', '.join(start.left)}")
    return notes


def notes_on_noise(noise: Compared) -> list[str]:
    """About two undisturbed runs."""
    fields = [f"{item.name} (up to {item.largest:.3g})" for one in noise.series for item in one.differences]
    tensors = len(noise.tensors.differences)
    if not fields and not tensors:
        return ["two undisturbed runs were equal"]
    differing = ", ".join(([counted(tensors, "tensor")] if tensors else []) + fields)
    return [
        f"the trainer is not deterministic: two undisturbed runs differ in {differing}. "
        "As much is allowed after a kill, so a smaller fault of the resume would not be seen"
    ]


def notes_on_logs(compared: Compared) -> list[str]:
    """About what was logged, where it is not the numbers that differ; and about what was not compared."""
    notes = []
    for one in compared.series:
        if one.again:
            notes.append(
                f"{one.path}: {told_steps(one.again)} logged again, {counted(len(one.again), 'step')}"
            )
        if one.missing and compared.tensors.names and not compared.tensors.differences:
            notes.append(
                f"{one.path} lacks {told_steps(one.missing)}: done, as the tensors prove, not logged"
            )
        if one.damaged:
            notes.append(f"{one.path}: {counted(one.damaged, 'line')} cut off by a kill")
    if not (compared.tensors.names or compared.tensors.differences) and compared.series:
        notes.append("no tensors were compared, only what was logged")
    skipped = [f"not compared: {path}: {why}" for path, why in compared.tensors.skipped.items()]
    notes += skipped[:_MOST_FILES]
    if len(skipped) > _MOST_FILES:
        notes.append(f"not compared: {counted(len(skipped) - _MOST_FILES, 'more file')} of tensors")
    if compared.others:
        notes.append(f"not compared: {counted(compared.others, 'other file')}, unless --compare names them")
    return notes
