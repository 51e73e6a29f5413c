"""Runs of the toy engine on real processes, one for each rank, that die as they are told.

`MortalRanks.start` is a start of the run: the real session, journal, checkpoints and files; only what
computes is the toy engine, and the ranks are forked and connected by `fork_ranks.py`, a process of its
own that lives as long as this does. Each rank dies, by SIGKILL, at a point of `kill_points` or at an
instant.

Each rank keeps a diary, one line a write, which survives it: what it generated, and what was finished.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import rollforward

PROGRAM = Path(__file__).with_name("fork_ranks.py")
SOURCES = str(Path(rollforward.__file__).parents[1])


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run: what the command line would say, and how it ends."""

    root: str
    """Of the `toy_session.Place`."""
    run: str
    world_size: int = 1
    resume: bool = False
    source: str = ""
    position: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """To the configuration, as `Place.overrides` takes them."""
    points: Mapping[str, str] = field(default_factory=dict)
    """Rank -> the kill point it dies at. Ranks are strings because JSON wants them so."""
    after: float | None = None
    """Seconds from the fork at which `victims` are killed."""
    victims: Sequence[int] = ()


class MortalRanks:
    """Forks ranks, in another process, and tells how they ended."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A library that has threads of its own is not safe to fork.
            env=os.environ | {"PYTHONPATH": SOURCES, "OPENBLAS_NUM_THREADS": "1"},
        )

    def start(self, start: Start) -> list[int]:
        """Run until every rank has ended; how each did: 0, 1 after an error, or -9."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(start)) + "\n")
        self._process.stdin.flush()
        codes: list[int] = json.loads(self._process.stdout.readline())
        for rank, code in enumerate(codes):
            said = said_by(Path(start.root), start.run, rank)
            assert code in (0, -signal.SIGKILL), f"rank {rank} ended with {code}: {said.read_text()[-3000:]}"
        return codes

    def __enter__(self) -> "MortalRanks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()


def said_by(root: Path, run: str, rank: int) -> Path:
    """Where a rank's output goes, of all starts."""
    return root / f"{run}.rank_{rank}.txt"


def diary(root: Path, run: str, rank: int) -> list[list[str]]:
    """Of all its starts: ["generated", chunk], ["finished", chunk, position], ["killed", point]."""
    file = diary_file(root, run, rank)
    return [line.split("\t") for line in file.read_text().splitlines()] if file.exists() else []


def diary_file(root: Path, run: str, rank: int) -> Path:
    return root / f"{run}.diary_{rank}.txt"
