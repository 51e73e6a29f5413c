"""What a run left in its folder, whatever trainer it is of: its newest checkpoint, and its series of steps.

The rules, by names alone, so that both runs are looked at in the same way:

- A folder with `commits/` is a run of ours; its own readers say what counts.
- A file that may hold tensors (`TENSORS`) and `trainer_state.json` belong to a **family**: its path, with the
  numbers of steps taken out. `checkpoint-12/optimizer.pt` is 12 of `checkpoint-*/optimizer.pt`,
  `epoch=1-step=40.ckpt` is (1, 40) of `epoch=*-step=*.ckpt`. Of each family the highest counts: that is the
  newest checkpoint. A file without such a number is a family of its own. The shards of one model
  (`-00001-of-00003`) are one.
- `*.jsonl` is a series of steps.

Symbolic links are not followed. Everything else is not compared unless it is named.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from rollforward.position import Position
from rollforward.proving.series import TRAINER_STATE, Series, read_series
from rollforward.store.layout import COMMITS, parse_manifest_name

TENSORS = frozenset({".safetensors", ".ckpt", ".pt", ".pth", ".bin"})

_NUMBERED = re.compile(
    r"(?<![a-z])(?:checkpoint|ckpt|global_?step|step|iteration|iter|epoch|update|round)s?[-_=.]?\d+"
    r"|-\d+_\d+(?=\.\w+$)",  # <epoch>_<step>, at the end of a name
    re.IGNORECASE,
)
_SHARD = re.compile(r"[-_]\d+-of-\d+")
_DIGITS = re.compile(r"\d+")

Numbers = tuple[int, ...]


@dataclass
class Newest:
    """The newest of a family of files."""

    numbers: Numbers
    """Empty when the name has none."""
    files: list[str]
    """Relative to the run's folder; several when they are shards of one."""

    @property
    def label(self) -> str:
        """The path, without the number of a shard."""
        return _SHARD.sub("", self.files[0])


@dataclass
class Leavings:
    """What there is in a run's folder; paths are relative, with `/`."""

    folder: Path
    runs: dict[str, Position] = field(default_factory=dict)
    """Folders of runs of ours, "." is the folder itself, and the highest position of a manifest in each."""
    tensors: dict[str, Newest] = field(default_factory=dict)
    """Family -> the newest of it."""
    series: dict[str, Newest] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)
    """Files that the user named, of no kind above."""
    others: int = 0
    """Files that are not compared."""

    @property
    def saved(self) -> bool:
        """Whether there is anything that a start may resume from."""
        return bool(self.runs or self.tensors)

    @property
    def newest(self) -> Numbers:
        """The numbers of the newest checkpoint, such as (12,); empty when none has a number."""
        positions = [(position.epoch, position.step) for position in self.runs.values()]
        return max([*positions, *(found.numbers for found in self.tensors.values())], default=())

    def read(self, series: str) -> Series:
        """One of `series`; empty when there is none."""
        found = self.series.get(series)
        return Series() if found is None else read_series(self.folder / found.files[0])


def look_at(folder: Path, named: Sequence[str] = ()) -> Leavings:
    """Look through a run's folder; `named` are the user's globs for other files."""
    found = Leavings(folder)
    files = list(_files(folder))
    for path in files:
        above, position = PurePosixPath(path).parent, parse_manifest_name(PurePosixPath(path).name)
        if above.name == COMMITS and position is not None:
            run = str(above.parent)
            found.runs[run] = max(position, found.runs.get(run, position))
    for path in files:
        suffix = PurePosixPath(path).suffix
        ours = any(run == "." or path.startswith(f"{run}/") for run in found.runs)
        if suffix == ".jsonl" or path.rpartition("/")[2] == TRAINER_STATE:
            _add(found.series, path)
        elif suffix in TENSORS and not ours:
            _add(found.tensors, path)
        elif any(fnmatch(path, glob) for glob in named):
            found.named.append(path)
        elif not ours:
            found.others += 1
    return found


def family_of(path: str) -> tuple[str, Numbers]:
    """A path without the numbers of steps, and these."""
    numbers = [int(number) for match in _NUMBERED.finditer(path) for number in _DIGITS.findall(match[0])]
    family = _NUMBERED.sub(lambda match: _DIGITS.sub("*", match[0]), path)
    return _SHARD.sub("", family), tuple(numbers)


def _add(families: dict[str, Newest], path: str) -> None:
    family, numbers = family_of(path)
    known = families.get(family)
    if known is None or numbers > known.numbers:
        families[family] = Newest(numbers, [path])
    elif numbers == known.numbers:
        known.files.append(path)


def _files(folder: Path) -> Iterable[str]:
    """Every regular file, in order; links are left out."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent) / name
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix()
