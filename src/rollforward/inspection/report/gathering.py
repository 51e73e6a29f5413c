"""The parts of a run that a page shows, as JSON: read once for a file, again and again to follow the run.

A part that cannot be read says why; the others are shown. Nothing here writes, and no lock is taken: the run
may be training meanwhile.
"""

import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rollforward.errors import RollforwardError
from rollforward.inspection.folder import open_run
from rollforward.inspection.history import Past, read_past
from rollforward.inspection.report import curves, health, past, sampling
from rollforward.inspection.report.curves import Figures, read_figures
from rollforward.position import Position
from rollforward.storage.address import is_remote
from rollforward.store.journal.writing import utc_now
from rollforward.wording import plain

Parts = dict[str, Any]
"""Name -> JSON."""


class RunReader:
    """Reads the parts of one run; what one reading found is at hand for the next."""

    def __init__(
        self, folder: str, name: str, *, whole: Collection[Position] = (), deep: bool = False, share: int = 1
    ) -> None:
        """`whole`: steps whose rollouts are shown whole. `share`: how many runs share the page's bytes."""
        self.name = name
        self.folder = folder
        self._storage = open_run(folder)
        self._whole, self._deep, self._share = whole, deep, share
        self._figures: Figures | None = None
        self._past: Past | None = None

    def curves(self) -> Parts:
        """The charts."""

        def read() -> Any:
            self._figures = read_figures(self._storage)
            most = max(1, curves.STRETCHES // self._share)
            return {"charts": curves.charts(self._figures, most), "left_out": sorted(self._figures.left_out)}

        return {"curves": _guarded(read)}

    def past(self) -> Parts:
        """The timeline; the rollouts, each step a part of its own."""

        def timeline() -> Any:
            self._past = read_past(self._storage)
            return past.as_json(self._past, self._steps(), time.time())

        def rollouts() -> Any:
            if self._past is None:
                return {"steps": []}
            return sampling.as_json(
                self._storage,
                self._past,
                past.numbering(self._past, self._steps()),
                whole=self._whole,
                most_bytes=sampling.MOST_BYTES // self._share,
            )

        parts = {"timeline": _guarded(timeline), "rollouts": _guarded(rollouts)}
        steps = parts["rollouts"].pop("steps", [])
        return parts | {f"rollouts/{step['position']}": step for step in steps}

    def health(self) -> Parts:
        """Verdicts, findings, configurations, versions."""

        def read() -> Any:
            found = self._past or read_past(self._storage)
            return health.as_json(self._storage, found, deep=self._deep)

        return {"health": _guarded(read)}

    def _steps(self) -> Figures:
        return self._figures or Figures()


def readers_of(
    folders: Iterable[str | Path], *, whole: Collection[Position] = (), deep: bool = False
) -> list[RunReader]:
    """A reader for each run; NothingToResume when a folder is none."""
    # Unlike Path.resolve, it raises for no loop of links.
    named = list(dict.fromkeys(str(each) if is_remote(each) else os.path.realpath(each) for each in folders))
    return [
        RunReader(folder, name, whole=whole, deep=deep, share=len(named))
        for folder, name in zip(named, names_of(named), strict=True)
    ]


def about(readers: Sequence[RunReader]) -> dict[str, Any]:
    """What a page says of itself: when it was made, by which version, of which runs."""
    return {
        "made": utc_now(),
        "version": version("rollforward"),
        "runs": [{"name": reader.name, "folder": plain(reader.folder)} for reader in readers],
    }


def gather(readers: Sequence[RunReader]) -> Parts:
    """All parts of all runs, read once; names begin with the number of the run."""
    return {
        f"{number}/{name}": value
        for number, reader in enumerate(readers)
        for read in (reader.curves, reader.past, reader.health)
        for name, value in read().items()
    }


def _guarded(read: Callable[[], Any]) -> Any:
    try:
        return _plain(read())
    except RollforwardError as error:
        return {"error": "\n".join(filter(None, [error.message, error.hint]))}
    except RecursionError:
        return {"error": "a file of the run nests too deep to be shown"}


def _plain(value: Any) -> Any:
    """The value as any JSON parser takes it: numbers that are not finite become words."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def encode(value: Any) -> bytes:
    """JSON in ASCII: lone surrogates, which no encoding can write, are escapes like all the rest."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def names_of(folders: Sequence[str]) -> list[str]:
    """A short name for each run: what tells its path from the others'; of a single one the last two parts."""
    parts = [Path(folder).parts for folder in folders]
    if len(parts) == 1:
        return [_joined(parts[0][-2:])]
    while len({each[-1] for each in parts}) == 1 and all(len(each) > 1 for each in parts):
        parts = [each[:-1] for each in parts]
    deepest = max(map(len, parts), default=0)
    depth = next((depth for depth in range(1, deepest) if _differ(parts, depth)), deepest)
    return [_joined(each[-depth:]) for each in parts]


def _differ(parts: Sequence[tuple[str, ...]], depth: int) -> bool:
    return len({each[-depth:] for each in parts}) == len(parts)


def _joined(parts: tuple[str, ...]) -> str:
    return plain(str(Path(*parts)))
