"""Real processes on a real disk, killed with SIGKILL at random instants: nothing is lost, nothing differs."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from simulated_disk import SimulatedDisk
from toy_run import Work, run_rank, same

import rollforward
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import find, read_tensors

WORKER = Path(__file__).with_name("journal_worker.py")
SOURCES = str(Path(rollforward.__file__).parents[1])


def started(folder: Path, epochs: int) -> "subprocess.Popen[str]":
    """A worker that has got past its imports."""
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(folder), str(epochs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": SOURCES},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def kill_until_done(folder: Path, epochs: int, kills: int, seconds: float) -> int:
    """Kill so many workers, each within `seconds` of its start, then let one come to its end."""
    rng = random.Random(epochs)
    done = 0
    for _ in range(kills):
        process = started(folder, epochs)
        try:
            process.wait(rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            done += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -9), errors
    process = started(folder, epochs)
    output, errors = process.communicate(timeout=300)
    assert output == "ended\n", errors
    return done


def check_end(folder: Path, epochs: int) -> None:
    end = Position(epochs, 0)
    whole = run_rank(LocalStorage("/run", SimulatedDisk()), 0, 1, lambda value: [value], Work(), end=end)
    manifest = find(LocalStorage(folder)).manifest
    assert manifest.position == end
    found: dict[str, dict[str, object]] = {}
    for role, name, array in read_tensors(LocalStorage(folder), manifest):
        found.setdefault(role, {})[name] = array
    assert same(whole, found)  # type: ignore[arg-type]


def test_workers_that_are_killed_lose_nothing(tmp_path: Path) -> None:
    assert kill_until_done(tmp_path, 40, kills=5, seconds=0.4) >= 2
    check_end(tmp_path, 40)


@pytest.mark.slow
def test_two_hundred_workers_that_are_killed_lose_nothing(tmp_path: Path) -> None:
    # Long enough not to be done before the last kill, on a disk that is faster than most.
    kills = kill_until_done(tmp_path, 900, kills=200, seconds=0.3)
    print(f"{kills} kills")
    check_end(tmp_path, 900)
    assert kills == 200
