"""Folders that MindRLHF or MindFormers wrote: no manifests; `.ckpt` or `.safetensors`; `meta.json` per rank.

    <role folder>/rank_0/meta.json
    <role folder>/rank_0/<prefix>_rank_0-<epoch>_<step>.ckpt

MindFormers takes a new prefix when its trainer is started again in the same folder:
`<prefix>_rank_0_1-<epoch>_<step>.ckpt`. Of two files for the same position the later one counts.

The guarantee is weaker here: there are no digests, so a file truncated at a multiple of its
format's own framing looks complete. We follow MindFormers' rule: take the newest position that is
complete on every rank. A file newer than the one its `meta.json` names does not count (it is
written in place, so it may be half a file). Policy and optimizer must be at the same position;
the reference may be older.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rollforward.errors import NothingToResume
from rollforward.inputs import read_input
from rollforward.position import Position
from rollforward.store.layout import META, parse_rank
from rollforward.store.meta import MAX_META_BYTES, Meta, meta_line, parse_meta

_FILE = re.compile(
    r"(?P<prefix>.+?)(?P<attempt>\.[1-9]\d{0,5})?_rank_(?P<rank>\d{1,9})(?:_(?P<again>\d{1,9}))?"
    r"-(?P<epoch>\d{1,18})_(?P<step>\d{1,18})\.(ckpt|safetensors)",
    re.ASCII,
)


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A position that is complete in a folder without manifests."""

    position: Position
    files: Mapping[str, tuple[Path, ...]]
    """role -> the file of each rank."""
    warnings: tuple[str, ...]
    """What the user should know; one line each."""


@dataclass
class _RankFolder:
    """What one rank's folder for one role holds."""

    path: Path
    meta: Meta | None = None
    problem: str = ""
    """Why `meta.json` is of no use."""
    files: dict[Position, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line for an error message."""
        held = ", ".join(map(str, sorted(self.files))) or "no checkpoint files"
        said = self.problem or (
            f"meta.json names {self.meta.file} ({self.meta.position})" if self.meta else ""
        )
        return f"{self.path}: {said}; files of: {held}"


def find_foreign(
    folders: Mapping[str, str | Path], *, world_size: int, skip: Collection[Position] = ()
) -> ForeignCheckpoint:
    """The newest position not in `skip` that is complete on every rank of every role.

    `folders` is role -> the folder that holds `rank_<n>`; every role given must be there, `ref`
    at that position or else at its newest older one. Raises NothingToResume, which lists what
    each rank has.
    """
    found = {
        role: [_look(Path(folder) / f"rank_{rank}", rank) for rank in range(world_size)]
        for role, folder in folders.items()
    }
    complete = {role: _complete(ranks) for role, ranks in found.items()}
    leading = [role for role in found if role != "ref"] or list(found)
    common = set.intersection(*(complete[role] for role in leading)) if leading else set()
    usable = [
        position for position in common - set(skip) if _reference_position(complete, position) is not None
    ]
    if not usable:
        raise _nothing(folders, found, complete, world_size)
    position = max(usable)
    files: dict[str, tuple[Path, ...]] = {}
    places = ", ".join(dict.fromkeys(map(str, folders.values())))
    warnings = [f"{places}: no manifest, so nothing can be verified by digest"]
    for role, ranks in found.items():
        at = position if role in leading else _reference_position(complete, position)
        assert at is not None  # it was asked for above
        files[role] = tuple(rank.files[at] for rank in ranks)
        warnings += [warning for rank in ranks for warning in rank.warnings]
        if at != position:
            warnings.append(
                f"{folders[role]}: no complete {role} at {position}, its newest older one is {at}"
            )
        newer = max((found_at for rank in ranks for found_at in rank.files), default=at)
        if newer > position:
            warnings.append(f"{folders[role]}: {newer} is not complete everywhere; going back to {position}")
        warnings += _gone(folders[role], ranks, position)
    return ForeignCheckpoint(position, files, tuple(dict.fromkeys(warnings)))


def _gone(folder: str | Path, ranks: list[_RankFolder], position: Position) -> list[str]:
    """The files newer than the chosen position that `meta.json` names and that are missing."""
    gone = {
        rank.meta.position: rank
        for rank in reversed(ranks)
        if rank.meta is not None and rank.meta.position > position and rank.meta.position not in rank.files
    }
    return [
        f"{folder}: meta.json of {rank.path.name} names {rank.meta.file}, which is not there; going back to "
        f"{position}, and what was trained from there to {at} is lost"
        for at, rank in sorted(gone.items())
        if rank.meta is not None
    ]


def _look(folder: Path, rank: int) -> _RankFolder:
    found = _RankFolder(folder)
    if not folder.is_dir():
        found.problem = "there is no such folder"
        return found
    try:
        entries = sorted(folder.iterdir())
        found.meta = _read_meta(found, entries)
    except OSError as error:
        found.problem = f"cannot be read: {error.strerror}"
        return found
    for entry in entries:
        match = _FILE.fullmatch(entry.name)
        if match is None or int(match["rank"]) != rank or not entry.is_file() or entry.stat().st_size == 0:
            continue
        if match["attempt"]:
            continue  # one of our checkpoints, never committed, next to theirs
        position = Position(int(match["epoch"]), int(match["step"]))
        held = found.files.get(position)
        if held is None or _preference(found, entry) > _preference(found, held):
            found.files[position] = entry
    return found


def _preference(found: _RankFolder, path: Path) -> tuple[bool, int, bool]:
    """`meta.json`'s choice first, then the file of the later start, then safetensors."""
    match = _FILE.fullmatch(path.name)
    again = int(match["again"] or 0) if match else 0
    return found.meta is not None and path.name == found.meta.file, again, path.suffix == ".safetensors"


def _read_meta(found: _RankFolder, entries: list[Path]) -> Meta | None:
    path = found.path / META
    if path not in entries:
        names = [entry.name for entry in entries]
        held = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        found.problem = f"no meta.json; it holds {held or 'nothing'}"
        return None
    try:
        meta = parse_meta(read_input(path, MAX_META_BYTES))
    except OSError as error:
        found.problem = f"meta.json cannot be read: {error.strerror or error}"
        return None
    except ValueError as error:
        found.problem = f"meta.json: {error}"
        return None
    if meta.garbage:
        found.warnings.append(
            f"{path}: more follows after its JSON, as MindRLHF leaves it at the end of an epoch; ignored"
        )
    return meta


def _complete(ranks: list[_RankFolder]) -> set[Position]:
    """Positions that every rank has a file for, none newer than its `meta.json` says."""
    vouched = [rank.meta.position for rank in ranks if rank.meta is not None]
    if not ranks or len(vouched) < len(ranks):
        return set()
    return {
        position
        for position in set.intersection(*(set(rank.files) for rank in ranks))
        if position <= min(vouched)
    }


def _reference_position(complete: Mapping[str, set[Position]], position: Position) -> Position | None:
    """Which position to take the reference from: the same one, or the newest before it."""
    if "ref" not in complete:
        return position
    return max((found for found in complete["ref"] if found <= position), default=None)


def _nothing(
    folders: Mapping[str, str | Path],
    found: Mapping[str, list[_RankFolder]],
    complete: Mapping[str, set[Position]],
    world_size: int,
) -> NothingToResume:
    lines = [f"nothing to resume from: no position is complete on all {world_size} ranks; looked for"]
    lines += ["<folder>/rank_<n>/meta.json and <prefix>_rank_<n>-<epoch>_<step>.ckpt or .safetensors"]
    for role, ranks in found.items():
        positions = ", ".join(map(str, sorted(complete[role]))) or "none"
        lines.append(f"  {role} in {folders[role]}: complete positions: {positions}")
        lines += [f"    {rank.describe()}" for rank in ranks]
        lines += [f"    {line}" for line in _more_ranks(Path(folders[role]), world_size)]
    return NothingToResume(
        "\n".join(lines),
        hint=_lines_to_write(found)
        or "check --actor_checkpoint_path, --ref_checkpoint_path, and that as many workers start as saved",
    )


def _lines_to_write(found: Mapping[str, list[_RankFolder]]) -> str:
    """What to write into each missing or useless `meta.json`, where all other folders say the same."""
    ranks = [(role, rank) for role, folders in found.items() for rank in folders]
    told = {rank.meta.position for role, rank in ranks if rank.meta is not None and role != "ref"}
    told = told or {rank.meta.position for _, rank in ranks if rank.meta is not None}
    lines = []
    for role, rank in ranks:
        if rank.meta is not None or not rank.files:
            continue
        position = max(rank.files)
        if len(told) == 1 and (role != "ref" or max(told) in rank.files):
            position = max(told)
        file = rank.files.get(position)
        if file is not None:
            lines.append(f"write into {rank.path / META}: {meta_line(position, file.name)}")
    if not lines:
        return ""
    sure = "as the other folders say" if len(told) == 1 else "if these files are whole"
    return f"a folder of MindRLHF needs a meta.json for each rank; {sure}, " + "; ".join(lines)


def _more_ranks(folder: Path, world_size: int) -> list[str]:
    if not folder.is_dir():
        return [f"{folder} does not exist"]
    ranks = sorted(rank for entry in folder.iterdir() if (rank := parse_rank(entry.name)) is not None)
    extra = [rank for rank in ranks if rank >= world_size]
    return (
        [f"there are also folders of ranks {extra[0]} to {extra[-1]}: saved by more workers"] if extra else []
    )
