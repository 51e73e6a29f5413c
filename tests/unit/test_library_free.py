"""Free roles, figures, attachments, and what all processes make together: `open_run` beyond fixed tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lockstep import LockStep
from loop_run import write_at_once

import rollforward
from rollforward.errors import InputError, RunLocked, StorageError
from rollforward.replay.metrics import MetricsFile
from rollforward.storage import LocalStorage
from rollforward.store import find, read_attachments


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_at_once(monkeypatch)


class Died(Exception):
    """Ends a start in the middle."""


def train(path: Path, steps: int, *, dies_at: int | None = None, **options: Any) -> list[np.ndarray]:
    """A loop whose buffer grows with each step: only the checkpoint carries it over."""
    weights = {"policy": {"w": np.zeros(2)}}
    grown: list[np.ndarray] = []
    with rollforward.open_run(path, **options) as run:
        start = run.restore(weights, free=("buffer",))
        if start is not None and start.free:
            grown = [start.free["buffer"][str(n)] for n in range(len(start.free["buffer"]))]
        for step in range(start.step if start else 0, steps):
            batch = run.once(step, "batch", lambda step=step: np.full(step + 1, step, np.int64))
            with run.updating(step):
                if step == dies_at:
                    raise Died
                weights["policy"]["w"] += batch.sum()
                grown.append(batch)
            run.outcome(step, sum=float(weights["policy"]["w"][0]))
            run.metrics(step, reward=step / 2)
            run.metrics(step, length=step)
            buffer = {str(n): array for n, array in enumerate(grown)}
            run.checkpoint(step + 1, {**weights, "buffer": buffer}, every=2)
    return grown


def test_a_free_role_comes_back_with_the_names_and_shapes_that_it_had(tmp_path: Path) -> None:
    with pytest.raises(Died):
        train(tmp_path, 6, dies_at=5)
    resumed, whole = train(tmp_path, 6), train(tmp_path.with_name("whole"), 6)
    assert [array.tolist() for array in resumed] == [array.tolist() for array in whole]
    assert len(resumed) == 6


def test_the_first_checkpoint_may_have_nothing_in_a_free_role(tmp_path: Path) -> None:
    with pytest.raises(Died):
        train(tmp_path, 6, dies_at=0)
    assert set(find(LocalStorage(tmp_path)).manifest.roles) == {"policy"}
    assert len(train(tmp_path, 3)) == 3


def test_a_role_is_either_restored_into_arrays_or_free(tmp_path: Path) -> None:
    with rollforward.open_run(tmp_path) as run, pytest.raises(InputError, match="policy"):
        run.restore({"policy": {"w": np.zeros(1)}}, free=("policy",))


def test_figures_have_one_line_for_each_step_after_a_crash(tmp_path: Path) -> None:
    with pytest.raises(Died):
        train(tmp_path, 6, dies_at=5)
    train(tmp_path, 6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = {line["step"]: line for line in lines}
    assert sorted(last) == list(range(6))
    assert all(last[step]["reward"] == step / 2 and last[step]["length"] == step for step in range(6))
    assert [line["global_step"] for _, line in sorted(last.items())] == list(range(6))


def test_figures_of_another_step_are_refused(tmp_path: Path) -> None:
    with rollforward.open_run(tmp_path) as run:
        run.restore({"policy": {"w": np.zeros(1)}})
        with run.updating(0):
            pass
        with pytest.raises(InputError, match="neither under way nor the newest"):
            run.metrics(4, reward=1)


def test_a_disk_that_refuses_figures_does_not_end_the_run(tmp_path: Path) -> None:
    """Nor does it keep other processes waiting: only the first one writes them."""
    (tmp_path / "metrics.jsonl").mkdir(parents=True)
    said: list[str] = []
    assert len(train(tmp_path, 4, log=said.append)) == 4
    assert sum("no more figures are written to metrics.jsonl" in line for line in said) == 1


def test_a_disk_that_fills_up_under_the_figures_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: MetricsFile, _record: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(MetricsFile, "append", full)
    said: list[str] = []
    assert len(train(tmp_path, 4, log=said.append)) == 4
    assert sum("the disk is full" in line for line in said) == 1


def test_a_forked_child_neither_keeps_the_lock_nor_gives_it_up(tmp_path: Path) -> None:
    """As a worker that loads data: when its parent is killed the next start must get the folder."""
    with rollforward.open_run(tmp_path) as run:
        run.restore({"policy": {"w": np.zeros(1)}})
        child = os.fork()
        if child == 0:
            run.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(RunLocked), rollforward.open_run(tmp_path):
            pass
    program = (
        "import os, sys, rollforward; run = rollforward.open_run(sys.argv[1]); "
        "os.fork() or __import__('time').sleep(60); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    with rollforward.open_run(tmp_path):
        pass


def test_attachments_go_with_every_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, 2, attachments={"config.json": b"{}"})
    storage = LocalStorage(tmp_path)
    assert read_attachments(storage, find(storage).manifest) == {"config.json": b"{}"}


def test_what_is_made_together_is_made_by_all_or_by_none(tmp_path: Path) -> None:
    """Rank 1 loses its record: rank 0 makes its own again, since both communicate while they do."""
    made: list[tuple[int, int]] = []

    def work(rank: int, exchange: Any, dies: bool) -> float:
        weights = {"policy": {"w": np.zeros(2)}}
        options: Any = {"rank": rank, "world_size": 2, "all_gather": exchange}
        with rollforward.open_run(tmp_path, **options) as run:
            start = run.restore(weights)
            for step in range(start.step if start else 0, 3):

                def make(step: int = step) -> np.ndarray:
                    made.append((rank, step))
                    return np.array(exchange(rank + 10 * step), np.int64)

                batch = run.once(step, "batch", make, together=True)
                with run.updating(step):
                    if dies and step == 2:
                        raise Died
                    weights["policy"]["w"] += batch
                run.outcome(step, sum=float(weights["policy"]["w"].sum()))
        return float(weights["policy"]["w"].sum())

    def start(dies: bool) -> list[Any]:
        made.clear()
        return LockStep(2).run(lambda rank, exchange: work(rank, exchange, dies))

    assert all(isinstance(end, Died) for end in start(dies=True))
    segment = max((tmp_path / "journal/rank_1").iterdir(), key=lambda path: path.stat().st_size)
    content = segment.read_bytes()
    # The newest record of rank 1 is torn, as by a power loss: that of step 2.
    segment.write_bytes(content[: content.rindex(b"batch")])
    assert start(dies=False) == [63, 63]
    assert sorted(made) == [(0, 2), (1, 2)]
