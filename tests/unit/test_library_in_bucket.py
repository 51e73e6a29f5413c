"""`open_run` at an address, over a service in memory: a loop of one's own whose machine is lost."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_service import Service, serve
from numpy.typing import NDArray

import rollforward
from rollforward.errors import InputError, RunLocked, StorageError

RUN = "s3://bucket/loop"
STEPS = 8


class Lost(Exception):
    """The machine is gone in the middle of a step."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Service]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return serve(monkeypatch)


def train(address: str | Path, *, ends_in: int = STEPS, **options: Any) -> tuple[NDArray[Any], list[int]]:
    """The weights at the end, and in which steps something was sampled."""
    weights, sampled = np.zeros(3, np.float32), []

    def sample(step: int) -> NDArray[Any]:
        sampled.append(step)
        return np.random.default_rng([step, len(sampled)]).random(3).astype(np.float32)

    with rollforward.open_run(address, keep=2, **options) as run:
        start = run.restore({"policy": {"w": weights}})
        for step in range(start.step if start else 0, STEPS):
            batch = run.once(step, "batch", lambda step=step: sample(step))
            if step == ends_in:
                raise Lost
            with run.updating(step):
                weights += batch
            run.outcome(step, sum=float(weights.sum()))
            run.metrics(step, sum=float(weights.sum()))
            run.checkpoint(step + 1, {"policy": {"w": weights}}, every=3)
    return weights, sampled


@pytest.mark.parametrize("durability", ["local", "remote"])
def test_nothing_is_sampled_again_when_the_machine_is_lost(
    service: Service, tmp_path: Path, durability: str
) -> None:
    with pytest.raises(Lost):
        train(RUN, ends_in=5, journal_durability=durability)
    shutil.rmtree(tmp_path / "cache")
    weights, sampled = train(RUN, journal_durability=durability)
    assert sampled == [6, 7]
    again, sampled = train(RUN)
    assert (again.tobytes(), sampled) == (weights.tobytes(), [])
    assert service.at(RUN).stat("commits/0_6.json") is not None


def test_it_is_the_loop_of_a_folder(service: Service, tmp_path: Path) -> None:
    assert train(RUN)[0].tobytes() == train(tmp_path / "folder")[0].tobytes()
    names = {entry.name for entry in service.at(RUN).scan("")}
    assert names == {entry.name for entry in (tmp_path / "folder").iterdir()}


def test_options_and_working_folder_are_the_callers(service: Service, tmp_path: Path) -> None:
    said: list[str] = []
    train(RUN, work_dir=tmp_path / "here", storage_options={"region": "there"}, log=said.append)
    assert service.given[-1] == {"region": "there"}
    assert f"working folder: {tmp_path / 'here'}" in said
    assert not (tmp_path / "cache").exists()


def test_it_is_opened_once(service: Service) -> None:  # noqa: ARG001
    with rollforward.open_run(RUN), pytest.raises(RunLocked):
        rollforward.open_run(RUN)


def test_a_service_that_goes_away_is_no_reason_to_stop_but_at_the_end(service: Service) -> None:
    said: list[str] = []
    weights = np.zeros(3, np.float32)

    def cut_off() -> None:
        with rollforward.open_run(RUN, log=said.append) as run:
            run.restore({"policy": {"w": weights}})
            for step in range(STEPS):
                batch = run.once(step, "batch", lambda: np.ones(3, np.float32))
                service.away = step >= 2
                with run.updating(step):
                    weights[...] += batch
                run.outcome(step, sum=float(weights.sum()))
                run.checkpoint(step + 1, {"policy": {"w": weights}}, every=3)

    with pytest.raises(StorageError, match="away"):
        cut_off()
    assert weights[0] == STEPS
    assert any("was not saved" in line for line in said)
    service.away = False
    resumed, sampled = train(RUN)
    assert (resumed.tolist(), sampled) == ([STEPS] * 3, [])


def test_no_step_waits_for_the_service_whatever_becomes_of_a_checkpoint(service: Service) -> None:
    weights, said = np.zeros(3, np.float32), list[str]()
    with rollforward.open_run(RUN, log=said.append) as run:
        run.restore({"policy": {"w": weights}})
        for step in range(STEPS):
            if step == 1:
                service.askers.clear()  # the first step opens what is written to
            batch = run.once(step, "batch", lambda: np.ones(3, np.float32))
            service.away = 2 <= step < 5
            with run.updating(step):
                weights += batch
            run.outcome(step, sum=float(weights.sum()))
            run.metrics(step, sum=float(weights.sum()))
            run.checkpoint(step + 1, {"policy": {"w": weights}})
        asked_by = set(service.askers)
    assert any("was not saved" in line for line in said)
    assert any("saved to" in line for line in said)
    assert "checkpoints" in asked_by
    assert threading.current_thread().name not in asked_by


def test_how_durable_is_one_of_two(service: Service) -> None:  # noqa: ARG001
    with pytest.raises(InputError, match="'local' or 'remote'"):
        rollforward.open_run(RUN, journal_durability="both")  # type: ignore[arg-type]
