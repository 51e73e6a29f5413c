"""What can be wrong with a run before it is resumed, and what to do about each.

Every check only looks and reports; none changes anything. `train` uses the folder checks too: when it
finds nothing to resume, its message ends with what they found.

    folders       rank folders, meta.json, files, steps: of our runs, and of MindRLHF's folders
    names         do policy and reference have the same model's parameters
    checkpoints   every byte, judged as in a resume; the journal; lists of files that must stay
    evidence      of starts that a non-finite number ended
    environment   what the engine's framework needs (its package checks that), disk space
"""

import difflib
import itertools
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollforward.engines.base import EnginePackage, Finding
from rollforward.errors import CheckpointInvalid, RollforwardError, StorageError
from rollforward.inputs import read_input
from rollforward.inspection.verifying import check_guests, check_journals
from rollforward.interop.files import read_layout
from rollforward.interop.names import is_bookkeeping, is_moment, plain_name
from rollforward.interop.role_folders import CheckpointFolders, what_is_near
from rollforward.interop.traces import lost_commits, what_to_try
from rollforward.position import Position
from rollforward.replay.saving import INTERVAL
from rollforward.storage import Conditional, LocalStorage, Storage
from rollforward.store import list_checkpoints
from rollforward.store.catalog import load_manifest, positions
from rollforward.store.judging import CheckpointInfo, Judge
from rollforward.store.layout import COMMITS, EVIDENCE, JOURNAL, META, parse_rank
from rollforward.store.lease import honours_conditions
from rollforward.store.lock import read_owner, without_successor
from rollforward.store.meta import MAX_META_BYTES, Meta, parse_meta
from rollforward.store.tensorfile import is_count
from rollforward.wording import counted, in_bytes, plain

_ROLES = {"policy": "policy_model", "optimizer": "optimizer", "reference": "ref"}
_SHOWN = 8
_LOOKS, _PAUSE = 4, 0.2
"""Further looks at folders in which something seems to be wrong; seconds between them."""


@dataclass(frozen=True, kw_only=True)
class RankFolder:
    """What is in `<role folder>/rank_N`."""

    rank: int
    path: Path
    names: tuple[str, ...]
    meta: Meta | None
    problem: str
    """Why `meta.json` is of no use; empty when it is fine."""


def examine(source: CheckpointFolders) -> list[Finding]:
    """All checks of the folders that a resumed run would start from."""
    return [*examine_folders(source), *_check_manifests(source), *_look_for_evidence(source.run)]


def examine_address(
    storage: Storage, engines: Iterable[EnginePackage], environment: Mapping[str, str]
) -> list[Finding]:
    """The checks of a run in object storage: what the service honours, who holds it, what is intact.

    And each engine's own checks.
    """
    found = [_check_conditions(storage)]
    owner = read_owner(storage)
    if owner is not None and owner.held:
        found.append(
            Finding(
                check="lock",
                level="note",
                text=f"held by {owner}, or not released by it",
                hint="a start finds out which, and takes over when it is not renewed any more",
            )
        )
    found += [*_check_checkpoints(storage), *_look_for_evidence_at(storage)]
    return [*found, *_check_engines(engines, environment)]


def _check_conditions(storage: Storage) -> Finding:
    if isinstance(storage, Conditional) and honours_conditions(storage, storage):
        return Finding(check="service", level="ok", text=f"{storage} answers, and honours conditional writes")
    return Finding(
        check="service",
        level="problem",
        text=f"{storage} answers, and does not honour conditional writes: two trainers could write to a run",
        hint="never start a run twice at the same moment, or use a service that honours If-Match and "
        "If-None-Match",
    )


def examine_at_a_glance(source: CheckpointFolders) -> list[Finding]:
    """Those of the checks that need no more than names, sizes and small files."""
    return [*examine_folders(source), *_look_for_evidence(source.run)]


def examine_folders(source: CheckpointFolders) -> list[Finding]:
    """The checks of the role folders.

    A run may save and prune meanwhile, so a problem with its folders counts only if every look finds it.
    """
    found = _examine_folders(source)
    problems = _problems(found)
    for _ in range(_LOOKS if _may_be_training(source.run) else 0):
        if not problems:
            break
        time.sleep(_PAUSE)
        found = _examine_folders(source)
        problems &= _problems(found)
    return [finding for finding in found if finding.level != "problem" or finding.text in problems]


def _may_be_training(run: Path) -> bool:
    """Whether the lock's owner has not released it: it is training, or was killed."""
    owner = read_owner(LocalStorage(run))
    return owner is not None and owner.held


def _problems(found: Iterable[Finding]) -> set[str]:
    return {finding.text for finding in found if finding.level == "problem"}


def _examine_folders(source: CheckpointFolders) -> list[Finding]:
    """What is in the role folders, as MindRLHF and MindFormers would see it."""
    folders = {"policy": source.policy, "optimizer": source.optimizer, "reference": source.reference}
    kept = _roles_of(source)
    if kept is not None:
        folders = {role: folder for role, folder in folders.items() if _ROLES[role] in kept}
    found: list[Finding] = []
    ranks: dict[str, list[RankFolder]] = {}
    if not source.optimizer.is_dir() and _hold_moments(rank_folders(source.policy)):
        del folders["optimizer"]
        text = f"{source.policy} holds policy and optimizer in one file, as MindFormers' trainer saves them"
        found.append(Finding(check="folders", level="note", text=text))
    workers = _workers(source.run)
    for role, folder in folders.items():
        there = rank_folders(folder)
        ranks[role] = [item for item in there if workers is None or item.rank < workers]
        found += _check_folder(role, folder, there, ranks[role])
    found += _check_steps(ranks)
    found += _check_files(ranks)
    found += _check_names(ranks)
    return found


def _workers(run: Path) -> int | None:
    """Of the newest checkpoint of ours: folders of further ranks are of workers that are gone."""
    storage = LocalStorage(run)
    for position in positions(storage):
        try:
            return load_manifest(storage, position).world_size
        except CheckpointInvalid:
            continue
    return None


def _roles_of(source: CheckpointFolders) -> Collection[str] | None:
    """The roles that the run itself keeps: a loop has those that it was given. None when not known."""
    if source.reference.parent != source.run:
        return None
    storage = LocalStorage(source.run)
    for position in positions(storage):
        try:
            return load_manifest(storage, position).role_digests().keys()
        except CheckpointInvalid:
            continue
    return None


def _hold_moments(items: Sequence[RankFolder]) -> bool:
    """Whether the policy's files hold an optimizer's moments."""
    try:
        return any(
            is_moment(name)
            for item in items
            if item.meta is not None and not item.problem
            for name in read_layout(item.path / item.meta.file)
        )
    except RollforwardError:
        return False


def rank_folders(folder: Path) -> list[RankFolder]:
    """The rank folders of a role, by rank."""
    if not folder.is_dir():
        return []
    ranks = sorted((rank, path) for path in folder.iterdir() if (rank := parse_rank(path.name)) is not None)
    return [_look(rank, path) for rank, path in ranks if path.is_dir()]


def _look(rank: int, path: Path) -> RankFolder:
    names: tuple[str, ...] = ()
    meta, problem = None, ""
    try:
        names = tuple(sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")))
        meta = parse_meta(read_input(path / META, MAX_META_BYTES))
        if meta.file not in names:
            problem = f"{META} names {meta.file}, which is not there"
    except FileNotFoundError:
        problem = f"no {META}"
    except OSError as error:
        problem = f"{META} cannot be read: {error.strerror or error}"
    except ValueError as error:
        problem = f"{META} cannot be used: {error}"
    return RankFolder(rank=rank, path=path, names=names, meta=meta, problem=problem)


def _check_folder(
    role: str, folder: Path, there: Sequence[RankFolder], ranks: Sequence[RankFolder]
) -> Iterator[Finding]:
    """`ranks`: those of the folders there that are of workers of the newest checkpoint."""
    if not folder.is_dir():
        yield Finding(
            check="folders",
            level="problem",
            text=f"{role}: {folder} does not exist; {what_is_near(folder)}",
            hint="check the path, and $LOCAL_DEFAULT_PATH "
            f"({os.environ.get('LOCAL_DEFAULT_PATH') or 'not set'})",
        )
        return
    if not there:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:_SHOWN]) or "nothing"
        yield Finding(
            check="folders",
            level="problem",
            text=f"{role}: {folder} has no rank_0, rank_1, ...; there is {names}",
            hint="name the folder that holds rank_0: train/ or ref/ of a run",
        )
        return
    missing = _missing_ranks([item.rank for item in there])
    if missing:
        yield Finding(
            check="folders",
            level="problem",
            text=f"{role}: {folder} has no folder for rank {missing}",
            hint="copy the missing ranks from the machine that saved them",
        )
    for item in ranks:
        held = ", ".join(item.names[:_SHOWN]) or "nothing"
        if item.problem:
            yield Finding(
                check="meta.json",
                level="problem",
                text=f"{role}, rank {item.rank}: {item.problem}; {item.path} holds {held}",
                hint=f"a run with {COMMITS}/ resumes without it and writes it again; for another, name an "
                "older run, or write it by hand: last_epoch, last_step, last_ckpt_file",
            )
        elif item.meta is not None:
            yield Finding(
                check="meta.json",
                level="note" if item.meta.garbage else "ok",
                text=f"{role}, rank {item.rank}: {item.meta.position}, {item.meta.file}"
                + ("; more text follows after its JSON, which is ignored" if item.meta.garbage else ""),
            )


def _missing_ranks(there: Sequence[int]) -> str:
    """The ranks below the highest that have no folder, as in `1, 4 to 6`; `there` in order."""
    gaps = [(one + 1, other - 1) for one, other in itertools.pairwise([-1, *there]) if other > one + 1]
    told = [str(first) if first == last else f"{first} to {last}" for first, last in gaps]
    return ", ".join(told[:_SHOWN]) + (f" and {len(told) - _SHOWN} more gaps" if len(told) > _SHOWN else "")


def _check_steps(ranks: Mapping[str, Sequence[RankFolder]]) -> Iterator[Finding]:
    """Are all ranks of policy and optimizer at the same position?"""
    at: dict[Position, list[str]] = {}
    for role in ("policy", "optimizer"):
        for item in ranks.get(role, []):
            if item.meta is not None:
                at.setdefault(item.meta.position, []).append(f"{role} of rank {item.rank}")
    if len(at) > 1:
        told = "; ".join(f"{position}: {', '.join(who)}" for position, who in sorted(at.items()))
        yield Finding(
            check="steps",
            level="problem",
            text=f"policy and optimizer are at different steps: {told}",
            hint="an older position that all of them have is used, if there is one",
        )
    elif at:
        position = next(iter(at))
        later = [item for item in ranks.get("reference", []) if item.meta and item.meta.position > position]
        if later:
            yield Finding(
                check="steps",
                level="problem",
                text=f"the reference (rank {later[0].rank}) stands at a later step than policy and "
                f"optimizer, which stand at {position}",
                hint="name the ref/ folder of the same run",
            )
        else:
            yield Finding(check="steps", level="ok", text=f"all ranks stand at {position}")


def _check_files(ranks: Mapping[str, Sequence[RankFolder]]) -> Iterator[Finding]:
    """Can the file that each `meta.json` names be opened?"""
    opened = 0
    for role, items in ranks.items():
        for item in items:
            if item.meta is None or item.problem:
                continue
            try:
                read_layout(item.path / item.meta.file)
                opened += 1
            except RollforwardError as error:
                yield Finding(
                    check="files",
                    level="problem",
                    text=f"{role}, rank {item.rank}: {error.message}",
                    hint="an older checkpoint is used, if there is one; delete nothing before that worked",
                )
    if opened:
        yield Finding(check="files", level="ok", text=f"{opened} files open")


def _check_names(ranks: Mapping[str, Sequence[RankFolder]]) -> Iterator[Finding]:
    """Policy and reference are the same model, so their parameters have the same names."""
    names = {role: _all_names(ranks.get(role, [])) for role in ("policy", "reference")}
    if not all(names.values()):
        return
    text = compare_names("the policy", names["policy"], "the reference", names["reference"])
    if text:
        yield Finding(
            check="names", level="problem", text=text, hint="name the train/ and ref/ folders of one run"
        )
    else:
        yield Finding(
            check="names",
            level="ok",
            text=f"policy and reference have the same {len(names['policy'])} parameters",
        )


def _all_names(items: Sequence[RankFolder]) -> set[str]:
    found: set[str] = set()
    for item in items:
        if item.meta is not None and not item.problem:
            try:
                names = read_layout(item.path / item.meta.file)
                # MindRLHF prefixes the same model's names with the names of different trainers.
                found.update(plain_name(n) for n in names if not is_bookkeeping(n) and not is_moment(n))
            except RollforwardError:
                return set()
    return found


def compare_names(one: str, names: Collection[str], other: str, other_names: Collection[str]) -> str:
    """Which names are on one side only, each with the nearest on the other side; empty when none are."""
    lines = []
    for side, mine, theirs in ((one, names, other_names), (other, other_names, names)):
        alone = sorted(set(mine) - set(theirs))
        for name in alone[:_SHOWN]:
            near = difflib.get_close_matches(name, sorted(theirs), n=1)
            lines.append(f"  only in {side}: {name}" + (f" (nearest: {near[0]})" if near else ""))
        if len(alone) > _SHOWN:
            lines.append(f"  and {len(alone) - _SHOWN} more")
    return "\n".join([f"parameter names of {one} and {other} do not match:", *lines]) if lines else ""


def _check_manifests(source: CheckpointFolders) -> Iterator[Finding]:
    """Every byte of every checkpoint and of the journal, as a restore would check it."""
    storage = LocalStorage(source.run)
    lost = lost_commits(source)
    if lost:
        yield Finding(
            check="checkpoints",
            level="problem",
            text=f"the manifests of {source.run} are gone: there is none in {COMMITS}/; {'; '.join(lost)}",
            hint=what_to_try(source),
        )
    yield from _check_checkpoints(storage)


def _check_checkpoints(storage: Storage) -> Iterator[Finding]:
    judge = Judge(storage, deep=True)
    listed = [info for position in positions(storage) if (info := judge.judge(position)) is not None]
    for info in listed:
        if info.valid:
            yield Finding(
                check="checkpoints",
                level="ok",
                text=f"{info.position}, saved {info.created}, {in_bytes(info.size)}: every byte is intact",
            )
        else:
            yield Finding(
                check="checkpoints",
                level="problem",
                text=f"{info.position}: {info.reason}",
                hint="resuming takes the newest valid one"
                if any(other.valid for other in listed)
                else "there is no valid one: resume from a copy, or start again",
            )
    for line in judge.damaged_copies:
        yield Finding(
            check="checkpoints",
            level="problem",
            text=f"{line}; its other copy is whole",
            hint="a resume takes the whole one, and its next checkpoint writes both again",
        )
    if listed:
        yield from _tell_interval(next((info for info in listed if info.valid), None))
        yield from _check_what_must_stay(storage)


def _tell_interval(newest: CheckpointInfo | None) -> Iterator[Finding]:
    """How often the run saves, where it chooses that itself."""
    told = newest.manifest.state.get(INTERVAL) if newest is not None and newest.manifest is not None else None
    if newest is None or not isinstance(told, dict):
        return
    steps, why = told.get("steps"), told.get("why")
    if isinstance(steps, int) and is_count(steps) and isinstance(why, str) and why:
        yield Finding(
            check="checkpoints",
            level="ok",
            text=f"when {newest.position} was saved, the run saved every {counted(steps, 'step')}: "
            f"{plain(why)}",
        )


def _check_what_must_stay(storage: Storage) -> Iterator[Finding]:
    for file in check_guests(storage):
        yield Finding(
            check="checkpoints",
            level="problem",
            text=file.reason,
            hint="put back a copy of it: it says which files of another trainer must not be removed",
        )
    for line in without_successor(storage):
        if line.startswith(f"{JOURNAL}/"):
            continue  # reported for the journal, below
        yield Finding(check="starts", level="problem", text=line, hint="move it away")
    for journal in check_journals(storage):
        for problem in journal.problems:
            yield Finding(
                check="journal",
                level="problem",
                text=problem,
                hint="a resume replays up to there, and generates what is missing again",
            )
        if not journal.problems:
            yield Finding(
                check="journal",
                level="ok",
                text=f"rank {journal.rank}, {in_bytes(journal.size)}: every record is intact",
            )


def _look_for_evidence(run: Path) -> Iterator[Finding]:
    """Did an earlier start stop because of a non-finite number?"""
    yield from _look_for_evidence_at(LocalStorage(run))


def _look_for_evidence_at(storage: Storage) -> Iterator[Finding]:
    for name in _evidence_of(storage):
        step, _, start = name.partition("-")
        yield Finding(
            check="evidence",
            level="note",
            text=f"start {start} stopped at step {step}: a number was not finite",
            hint=f"{storage}/{EVIDENCE}/{name} names the samples and has all that was computed; delete it "
            "when that is known",
        )


def _evidence_of(storage: Storage) -> list[str]:
    """The names of the evidence folders of a run, in order."""
    try:
        return sorted(entry.name for entry in storage.scan(EVIDENCE) if entry.kind == "folder")
    except StorageError:
        return []


def examine_environment(
    save: Path, needed: int, engines: Iterable[EnginePackage], environment: Mapping[str, str]
) -> list[Finding]:
    """Each engine's own checks, and whether `needed` bytes fit where the next checkpoint goes."""
    return [*_check_engines(engines, environment), _check_disk(save, needed)]


def _check_engines(engines: Iterable[EnginePackage], environment: Mapping[str, str]) -> list[Finding]:
    return [finding for engine in engines for finding in engine.examine(environment)]


def _check_disk(save: Path, needed: int) -> Finding:
    near = next(part for part in (save.absolute(), *save.absolute().parents) if part.is_dir())
    free = shutil.disk_usage(near).free
    text = f"{in_bytes(free)} are free in {near}, the next checkpoint takes about {in_bytes(needed)}"
    if free < needed:
        return Finding(
            check="disk",
            level="problem",
            text=text,
            hint="free some space, lower rl_config.save_max_ckpt_num, or name another --save_checkpoint_dir",
        )
    return Finding(check="disk", level="ok", text=text)


def next_checkpoint_bytes(run: Path) -> int:
    """How much space a run's next checkpoint takes: as much as its newest; 0 when there is none."""
    if not (run / COMMITS).is_dir():
        named = (
            item.path / item.meta.file
            for folder in ("train", "optimizer")
            for item in rank_folders(run / folder)
            if item.meta is not None and not item.problem
        )
        return sum(path.stat().st_size for path in named if path.is_file())
    return next((info.size for info in list_checkpoints(LocalStorage(run)) if info.valid), 0)
