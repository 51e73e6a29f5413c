"""`open_run` in the hands of a loop: what it gives back, what it notices, and what it refuses."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from lockstep import LockStep
from loop_run import Exchange, Work, run_loop, same, write_at_once
from simulated_disk import SimulatedDisk

import rollforward
from rollforward.errors import (
    CheckpointMismatch,
    InputError,
    NothingToResume,
    ReplayDiverged,
    RollforwardError,
    RunLocked,
    StorageError,
)
from rollforward.position import Position
from rollforward.replay import report as recovery_report
from rollforward.storage import LocalStorage
from rollforward.store import Retention, find
from rollforward.store.catalog import positions

Tensors = dict[str, dict[str, np.ndarray]]


def fresh() -> Tensors:
    return {"policy": {"w": np.zeros(3)}, "optimizer": {"m": np.zeros(3, np.float32)}}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is written where it begins, and visible after the next update."""
    write_at_once(monkeypatch)


class Died(Exception):
    """Ends a start in the middle."""


def train(
    path: Path,
    steps: int = 6,
    *,
    every: int | None = 4,
    make: Callable[[int], Any] = lambda step: np.arange(3.0) * step,
    dies_at: int | None = None,
    loss: Callable[[float], float] = float,
    **options: Any,
) -> Tensors:
    """A loop that counts its steps; it may die in the update of one."""
    tensors = fresh()
    said = options.pop("said", [])
    with rollforward.open_run(path, log=said.append, **options) as run:
        start = run.restore(tensors)
        for step in range(start.step if start else 0, steps):
            batch = run.once(step, "batch", lambda step=step: make(step))
            with run.updating(step):
                if step == dies_at:
                    raise Died
                tensors["policy"]["w"] += batch + 0.1
                tensors["optimizer"]["m"] += 1
            run.outcome(step, loss=loss(tensors["policy"]["w"].sum()))
            run.checkpoint(step + 1, tensors, every=every)
    return tensors


def killed(path: Path, at: int = 5, **how: Any) -> None:
    """Checkpoints 0 and 4; steps 4 and up to the one it dies at in the journal."""
    with pytest.raises(Died):
        train(path, dies_at=at, **how)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[rollforward.Run]:
    """A new run, restored."""
    opened = rollforward.open_run(tmp_path / "run", log=lambda _: None)
    opened.restore(fresh())
    yield opened
    if not opened._closed:
        opened._abandon(Died())


# What it gives back


def test_a_resumed_loop_ends_as_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    killed(tmp_path / "run")
    made: list[int] = []

    def make(step: int) -> Any:
        made.append(step)
        return np.arange(3.0) * step

    said: list[str] = []
    assert same(train(tmp_path / "run", make=make, said=said), whole)
    assert made == []
    assert "recovery: lost: nothing" in said
    assert any("1 of 1 updates equal to the last bit" in line for line in said)


def test_a_new_run_starts_with_none_and_saves_what_the_arrays_hold_at_its_first_step(tmp_path: Path) -> None:
    tensors = fresh()
    with rollforward.open_run(tmp_path) as run:
        assert run.restore(tensors) is None
        tensors["policy"]["w"] += 7
        run.once(0, "x", lambda: np.zeros(1))
        assert positions(LocalStorage(tmp_path)) == [Position(0, 0)]
    other = fresh()
    with rollforward.open_run(tmp_path) as run:
        start = run.restore(other)
    assert start is not None
    assert (start.position, start.step, start.epoch, start.state) == (Position(0, 0), 0, 0, {})
    assert same(other, tensors)


def test_steps_may_be_pairs_and_state_comes_back(tmp_path: Path) -> None:
    state = {"metrics": {"reward": 0.5}, "cursor": [1, "two", None]}
    with rollforward.open_run(tmp_path) as run:
        run.restore(fresh())
        for step, following in (((0, 0), (0, 1)), ((0, 1), (1, 0))):
            with run.updating(step):
                pass
            run.checkpoint(following, fresh(), state=state)
    with rollforward.open_run(tmp_path) as run:
        start = run.restore(fresh())
        assert start is not None
        assert (start.position, start.epoch, start.step) == (Position(1, 0), 1, 0)
        assert start.state == state
    manifest = find(LocalStorage(tmp_path)).manifest
    assert manifest.metrics == {"reward": 0.5}
    assert manifest.global_step == 2


FORMS = [
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.array(2.5),
    {"a": np.zeros((0, 4), np.uint8), "b": np.array(True)},
    ({"big endian": np.arange(3, dtype=">f4"), "transposed": np.eye(3)[:, ::-1].T}, {"n": [1, 2.5, "x"]}),
    (np.float16([1, np.nan]), None),
    [1, 2, 3],
    {},
    {"low": np.arange(5).astype(ml_dtypes.bfloat16), "lower": np.array([0.5], ml_dtypes.float8_e4m3fn)},
]


def described(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(described, value))
    if isinstance(value, dict):
        return [(name, described(each)) for name, each in value.items()]
    if isinstance(value, np.ndarray):
        flags = value.flags
        return (
            value.dtype,
            value.shape,
            value.tobytes(),
            flags.writeable,
            flags.c_contiguous,
        )
    return value


@pytest.mark.parametrize("made", FORMS, ids=range(len(FORMS)))
def test_what_is_made_once_is_the_same_made_now_and_from_the_journal(tmp_path: Path, made: Any) -> None:
    found = []
    for _ in range(2):
        run = rollforward.open_run(tmp_path, log=lambda _: None)
        run.restore(fresh())
        found.append(run.once(0, "x", lambda: made))
        run._abandon(Died())
    now, recorded = map(described, found)
    assert recorded == now
    assert now is not None


def test_what_once_gives_may_be_changed_without_harm(tmp_path: Path) -> None:
    mine = np.zeros(3)
    run = rollforward.open_run(tmp_path, log=lambda _: None)
    run.restore(fresh())
    run.once(0, "x", lambda: mine)[:] = 9
    assert not mine.any()
    run._abandon(Died())
    with rollforward.open_run(tmp_path) as run:
        run.restore(fresh())
        again = run.once(0, "x", lambda: pytest.fail("made again"))
        assert not again.any()


def test_it_goes_on_with_a_finished_run_and_closes_it_without_work(tmp_path: Path) -> None:
    whole = train(tmp_path, every=3)
    before = positions(LocalStorage(tmp_path))
    assert same(train(tmp_path, every=3), whole)
    assert positions(LocalStorage(tmp_path)) == before
    longer = train(tmp_path, steps=8, every=3)
    assert longer["optimizer"]["m"][0] == 8


def test_every_counts_steps_over_all_starts_and_retention_is_kept(tmp_path: Path) -> None:
    train(tmp_path, steps=20, every=3, keep=Retention(newest=2, every=9))
    assert sorted(positions(LocalStorage(tmp_path))) == [Position(0, n) for n in (0, 9, 15, 18)]


def test_the_last_checkpoint_may_be_asked_for_twice(tmp_path: Path) -> None:
    for _ in range(2):
        tensors = fresh()
        with rollforward.open_run(tmp_path, log=lambda _: None) as run:
            start = run.restore(tensors)
            for step in range(start.step if start else 0, 2):
                run.outcome(step, loss=1.0)
                run.checkpoint(step + 1, tensors, every=2)
            run.checkpoint(2, tensors)
    assert sorted(positions(LocalStorage(tmp_path))) == [Position(0, 0), Position(0, 2)]


def test_a_step_without_an_outcome_is_replayed_like_any_other(tmp_path: Path) -> None:
    def loop(steps: int) -> list[int]:
        made: list[int] = []
        tensors = fresh()
        run = rollforward.open_run(tmp_path, log=lambda _: None)
        start = run.restore(tensors)
        for step in range(start.step if start else 0, steps):
            batch = run.once(step, "x", lambda step=step: made.append(step) or np.full(3, 1.0 + step))
            with run.updating(step):
                tensors["policy"]["w"] += batch
        run._abandon(Died())
        return made

    assert loop(4) == [0, 1, 2, 3]
    assert loop(6) == [4, 5]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train(Path("~/run"), steps=1)
    assert (tmp_path / "run" / "commits" / "0_0.json").exists()


def test_by_default_the_logger_of_the_package_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "rollforward"):
        for rate in (1, 2):
            with rollforward.open_run(tmp_path, facts={"lr": rate}) as run:
                run.restore(fresh())
                run.outcome(0, loss=1.0)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["warning: since the checkpoint was saved lr changed from 1 to 2"]
    assert any(record.levelno == logging.INFO for record in caplog.records)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.complex64, np.bool_, np.uint8, ">f8"])
def test_tensors_of_any_dtype_come_back_to_the_bit(tmp_path: Path, dtype: Any) -> None:
    values = np.array([0, 1, 1, 0]).astype(dtype)
    with rollforward.open_run(tmp_path, log=lambda _: None) as run:
        run.restore({"critic": {"w": values, "flipped": np.ones((2, 3), dtype)[:, ::-1].T}})
        run.outcome(0)
    found = {"critic": {"w": np.zeros(4, dtype), "flipped": np.zeros((2, 3), dtype)[:, ::-1].T}}
    with rollforward.open_run(tmp_path, log=lambda _: None) as run:
        run.restore(found)
    assert found["critic"]["w"].tobytes() == values.tobytes()
    assert found["critic"]["flipped"].tobytes() == np.ones((3, 2), dtype).tobytes()


# Replay


def test_one_bit_of_difference_stops_the_replay_and_names_the_value(tmp_path: Path) -> None:
    killed(tmp_path)
    with pytest.raises(
        ReplayDiverged, match=r"step 0_4: the replay gave loss .* where .* was recorded"
    ) as caught:
        train(tmp_path, loss=lambda value: float(np.nextafter(value, 99)))
    assert 'on_divergence="accept"' in (caught.value.hint or "")


def test_a_divergence_is_accepted_when_asked_and_is_what_counts_from_then_on(tmp_path: Path) -> None:
    killed(tmp_path)
    said: list[str] = []
    other = lambda value: value + 1.0  # noqa: E731
    with pytest.raises(Died):
        train(tmp_path, loss=other, on_divergence="accept", dies_at=5, said=said)
    assert any("continues as configured: loss" in line for line in said)
    train(tmp_path, loss=other)


def test_other_versions_are_compared_with_a_tolerance(tmp_path: Path) -> None:
    killed(tmp_path, versions={"torch": "2.5"})
    said: list[str] = []
    near = lambda value: value * (1 + 1e-9)  # noqa: E731
    train(tmp_path, loss=near, versions={"torch": "2.6"}, said=said)
    assert any("within tolerance, with torch 2.6 instead of 2.5" in line for line in said)


@pytest.mark.parametrize("last", [False, True])
def test_a_replay_that_ends_with_the_loop_is_reported_as_over(tmp_path: Path, last: bool) -> None:
    train(tmp_path)
    tensors, said = fresh(), list[str]()
    with rollforward.open_run(tmp_path, log=said.append) as run:
        start = run.restore(tensors)
        assert start is not None
        for step in range(start.step, 6):
            batch = run.once(step, "batch", lambda: pytest.fail("made again"))
            with run.updating(step):
                tensors["policy"]["w"] += batch + 0.1
            run.outcome(step, loss=tensors["policy"]["w"].sum())
        if last:
            run.checkpoint(6, tensors)
    assert any("2 of 2 updates equal to the last bit" in line for line in said)
    assert recovery_report.read(LocalStorage(tmp_path))[-1].over


def test_versions_may_be_anything_that_has_a_text(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, versions={"own": (1, 2)})


def test_nan_is_an_outcome_like_any_other(tmp_path: Path) -> None:
    killed(tmp_path, loss=lambda _: float("nan"))
    train(tmp_path, loss=lambda _: float("nan"))


def test_an_outcome_under_another_name_is_a_divergence(tmp_path: Path) -> None:
    killed(tmp_path)
    with rollforward.open_run(tmp_path) as run:
        run.restore(fresh())
        run.once(4, "batch", lambda: pytest.fail("made again"))
        with pytest.raises(ReplayDiverged, match=r"reward 1\.0 where 'none' was recorded; loss 'none' where"):
            run.outcome(4, reward=1.0)


def test_what_was_recorded_with_other_facts_is_named_and_made_again(tmp_path: Path) -> None:
    killed(tmp_path, facts={"lr": 0.1, "seed": 1})
    made: list[int] = []
    said: list[str] = []
    train(
        tmp_path,
        facts={"lr": 0.2, "seed": 1},
        make=lambda step: made.append(step) or np.zeros(3),
        said=said,
    )
    assert made == [4, 5]
    assert "warning: since the checkpoint was saved lr changed from 0.1 to 0.2" in said
    assert any("made with another configuration" in line for line in said)


def test_a_damaged_record_is_made_again_and_the_report_says_so(tmp_path: Path) -> None:
    killed(tmp_path)
    whole = train(tmp_path / "whole")
    segment = tmp_path / "journal" / "rank_0" / "1-0_4.journal"
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    said: list[str] = []
    assert same(train(tmp_path, said=said), whole)
    assert any("damaged" in line for line in said)
    report = recovery_report.read(LocalStorage(tmp_path))[-1]
    assert report.over
    assert report.lost


def test_a_damaged_checkpoint_costs_a_replay(tmp_path: Path) -> None:
    killed(tmp_path)
    whole = train(tmp_path / "whole")
    path = next(tmp_path.glob("*/rank_0/*-0_4.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    assert same(train(tmp_path, make=lambda _: pytest.fail("made again"), said=said), whole)
    assert any("checkpoint 0_4 was rejected" in line for line in said)
    assert any("5 of 5 updates equal to the last bit" in line for line in said)


def test_a_gap_in_the_journal_ends_the_replay_before_it(tmp_path: Path) -> None:
    killed(tmp_path, at=9, steps=10, every=2, keep=0)
    for step in (4, 6, 8):
        (tmp_path / "commits" / f"0_{step}.json").unlink()
    (tmp_path / "journal" / "rank_0" / "1-0_4.journal").unlink()
    made: list[int] = []
    said: list[str] = []

    def make(step: int) -> Any:
        made.append(step)
        return np.arange(3.0) * step

    ended = train(tmp_path, 10, every=2, make=make, said=said)
    assert same(ended, train(tmp_path / "whole", 10))
    assert made == [4, 5, 6, 7, 8, 9]
    assert any("2 steps to replay, up to 0_4" in line for line in said)
    assert any(line.startswith("recovery: lost: 3 finished steps from 0_4 on") for line in said), said


def test_a_run_whose_checkpoints_are_gone_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    killed(tmp_path)
    for path in (tmp_path / "commits").iterdir():
        path.unlink()
    with pytest.raises(NothingToResume, match="the journal of a run, but no checkpoint"):
        train(tmp_path)
    assert list(tmp_path.glob("journal/rank_0/*.journal"))


# Another loop than the one that was recorded


def other_loop(tmp_path: Path) -> rollforward.Run:
    killed(tmp_path)
    run = rollforward.open_run(tmp_path, log=lambda _: None)
    run.restore(fresh())
    return run


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda run: run.once(4, "other", lambda: 1),
            r"step 0_4: once\('other'\) where 'batch' was recorded",
        ),
        (
            lambda run: run.outcome(4, loss=1.0),
            r"step 0_4 ends after 0 results of once; it was recorded with 1",
        ),
        (lambda run: run.once(5, "batch", lambda: 1), r"step 0_5 where step 0_4 is expected"),
        (lambda run: run.once(0, "batch", lambda: 1), r"step 0_0 comes after step 0_3: steps only go up"),
        (lambda run: run.checkpoint(5, fresh()), r"checkpoint 0_5 where step 0_4 is expected"),
    ],
)
def test_a_loop_that_asks_for_something_else_is_refused(
    tmp_path: Path, call: Callable[[rollforward.Run], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message), other_loop(tmp_path) as run:
        call(run)


def test_more_results_than_were_recorded_are_refused(tmp_path: Path) -> None:
    with other_loop(tmp_path) as run:
        run.once(4, "batch", lambda: pytest.fail("made again"))
        with pytest.raises(
            InputError, match=r"'more' would be result 2 of once; the step was recorded with 1"
        ):
            run.once(4, "more", lambda: 1)


def test_a_step_that_comes_after_another_than_it_did_is_refused(tmp_path: Path) -> None:
    """Recorded after the end of epoch 0, which is shorter now."""
    run = rollforward.open_run(tmp_path, log=lambda _: None)
    run.restore(fresh())
    for step in ((0, 0), (0, 1)):
        run.outcome(step, loss=1.0)
    run.once((1, 0), "x", lambda: 1)
    run._abandon(Died())
    with rollforward.open_run(tmp_path) as run:
        run.restore(fresh())
        for step in ((0, 0), (0, 1)):
            run.outcome(step, loss=1.0)
        with pytest.raises(InputError, match="step 0_2 where step 1_0 is expected"):
            run.outcome((0, 2), loss=1.0)


# Misuse


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (lambda run: run.restore(fresh()), "restore was called twice"),
        (lambda run: (run.outcome(0, a=1), run.outcome(0, a=1)), "outcome of step 0_0 was recorded already"),
        (lambda run: (run.outcome(0, a=1), run.once(0, "x", lambda: 1)), "step 0_0 was recorded already"),
        (
            lambda run: (run.outcome(3, a=1), run.outcome(2, a=1)),
            "step 0_2 comes after step 0_3: steps only go up",
        ),
        (lambda run: (run.once(3, "x", lambda: 1), run.once(2, "x", lambda: 1)), "comes after step 0_3"),
        (lambda run: run.once(0, "x", lambda: run.once(0, "y", lambda: 1)), "inside once"),
        (lambda run: run.once(0, "x", lambda: np.array(["text"])), "cannot be stored"),
        (lambda run: run.once(0, "x", lambda: (1, float("nan"))), "cannot be stored"),
        (lambda run: run.once(0, "x", lambda: (1, 2, 3)), "a tuple of 3"),
        (lambda run: run.once(0, "x", lambda: {1: np.zeros(1)}), "the name 1 is not a string"),
        (lambda run: run.outcome(0, a="high"), "outcome a is 'high', not a number"),
        (lambda run: run.outcome(0, a=2**53 + 1), "which float64 cannot hold"),
        (lambda run: run.outcome("0", a=1), "'0' is not a step"),
        (lambda run: run.outcome(-1, a=1), "is negative"),
        (lambda run: run.outcome((1, 10**18), a=1), "more than 18 digits"),
        (
            lambda run: (run.once(1, "x", lambda: 1), run.checkpoint(1, fresh())),
            "name the step that comes next",
        ),
        (lambda run: (run.outcome(1, a=1), run.checkpoint(1, fresh())), "checkpoint 0_1 after step 0_1"),
        (lambda run: run.checkpoint(1, fresh(), every=0), "every 0 steps"),
        (
            lambda run: (run.outcome(0), run.checkpoint(1, fresh()), run.outcome(2)),
            "step 0_2 where step 0_1 is expected",
        ),
        (lambda run: run.checkpoint(1, {"policy": {}}), "not the tensors of restore"),
        (
            lambda run: run.checkpoint(1, {**fresh(), "policy": {"w": np.zeros(4)}}),
            r"policy w is float64 \[4\] and was float64 \[3\]",
        ),
        (lambda run: run.checkpoint(1, fresh(), state={"x": {1, 2}}), "state: "),
        (lambda run: (run.close(), run.outcome(0)), "the run is closed"),
    ],
)
def test_what_is_not_in_order_is_refused_in_words(
    run: rollforward.Run, calls: Callable[[rollforward.Run], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        calls(run)
    assert caught.value.hint


def test_nothing_may_be_done_inside_an_update_or_after_one_that_failed(run: rollforward.Run) -> None:
    def update() -> None:
        with run.updating(0):
            with pytest.raises(InputError, match="an update is under way"):
                run.once(0, "x", lambda: 1)
            raise Died

    with pytest.raises(Died):
        update()
    with pytest.raises(InputError, match="an update is under way"):
        run.outcome(0, a=1)


def test_restore_comes_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="call restore first"), rollforward.open_run(tmp_path) as run:
        run.outcome(0, loss=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 2}, "needs all_gather"),
        ({"rank": 1}, "rank 1 of 1 processes"),
        ({"on_divergence": "ignore"}, "on_divergence is 'ignore'"),
        ({"facts": {"x": float("inf")}}, "facts: "),
        ({"world_size": 2, "all_gather": lambda value: [value]}, "call themselves"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        rollforward.open_run(tmp_path / "run", **options)
    with rollforward.open_run(tmp_path / "run"):
        """The lock was let go."""


def test_a_run_that_is_open_cannot_be_opened_again(tmp_path: Path) -> None:
    with rollforward.open_run(tmp_path), pytest.raises(RunLocked, match="is held by process"):
        rollforward.open_run(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"policy": {"w": [1, 2]}}, "is of list, not a NumPy array"),
        ({"policy": {"w": np.array(["a"])}}, "cannot be stored"),
        ({"Policy": {"w": np.zeros(1)}}, "'Policy' cannot be the name of a role"),
        ({"journal": {"w": np.zeros(1)}}, "'journal' cannot be the name of a role"),
        ({"policy": {"w": np.broadcast_to(0.0, 3)}}, "is read-only"),
    ],
)
def test_tensors_that_a_checkpoint_cannot_be_read_into_are_refused(
    tmp_path: Path, tensors: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message), rollforward.open_run(tmp_path) as run:
        run.restore(tensors)


def test_a_checkpoint_of_other_tensors_is_not_restored(tmp_path: Path) -> None:
    killed(tmp_path)
    with pytest.raises(CheckpointMismatch, match="policy w"), rollforward.open_run(tmp_path) as run:
        run.restore({**fresh(), "policy": {"w": np.zeros(4)}})


def test_after_a_restore_that_failed_nothing_is_recorded_over_the_run(tmp_path: Path) -> None:
    killed(tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with rollforward.open_run(tmp_path) as run:
        with pytest.raises(CheckpointMismatch):
            run.restore({"policy": {"w": np.zeros(4)}})
        with pytest.raises(InputError, match="call restore first"):
            run.outcome(0, loss=1.0)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_weights_that_change_outside_updating_are_found(tmp_path: Path) -> None:
    with rollforward.open_run(tmp_path, prove_unchanged=True) as run:
        tensors = fresh()
        run.restore(tensors)
        tensors["policy"]["w"] += 1  # before the first step they may
        with run.updating(0):
            tensors["policy"]["w"] += 1
        run.outcome(0, loss=1.0)
        run.checkpoint(1, tensors)
        tensors["optimizer"]["m"][1] = 5
        with pytest.raises(InputError, match=r"update of step 0_1: changed outside updating: optimizer m"):
            run.updating(1).__enter__()
        tensors["optimizer"]["m"][1] = 0
    run = rollforward.open_run(tmp_path, prove_unchanged=True)
    run.restore(tensors)
    tensors["policy"]["w"] += 1
    with pytest.raises(InputError, match="before the run was closed: changed outside updating"):
        run.close()


def test_arrays_may_be_other_ones_at_each_checkpoint(tmp_path: Path) -> None:
    """As of a framework that makes new arrays instead of changing them."""
    with rollforward.open_run(tmp_path, prove_unchanged=True) as run:
        tensors = fresh()
        run.restore(tensors)
        for step in range(3):
            with run.updating(step):
                tensors = {
                    role: {name: array + 1 for name, array in named.items()}
                    for role, named in tensors.items()
                }
            run.checkpoint(step + 1, tensors)
    found = fresh()
    with rollforward.open_run(tmp_path) as run:
        start = run.restore(found)
    assert start is not None
    assert start.step == 3
    assert same(found, tensors)


# Trouble


def test_an_error_in_the_loop_commits_nothing_and_lets_the_folder_go(tmp_path: Path) -> None:
    def loop() -> None:
        with rollforward.open_run(tmp_path) as run:
            tensors = fresh()
            run.restore(tensors)
            run.outcome(0, loss=1.0)
            run.checkpoint(1, tensors)
            raise Died

    with pytest.raises(Died):
        loop()
    assert positions(LocalStorage(tmp_path)) == [Position(0, 0)]
    with rollforward.open_run(tmp_path) as run:
        assert run.restore(fresh()) is not None


def test_a_checkpoint_that_fails_is_told_and_raised_only_if_none_newer_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalStorage.write
    full = [True]

    def failing(self: LocalStorage, path: str, buffers: Any) -> int:
        if full[0] and path.endswith("-0_4.safetensors"):
            raise StorageError("the disk is full", hint="make room")
        return write(self, path, buffers)

    monkeypatch.setattr(LocalStorage, "write", failing)
    said: list[str] = []
    with pytest.raises(
        StorageError, match=r"checkpoint 0_4 was not saved.*; the newest in the folder is 0_0"
    ):
        train(tmp_path / "one", said=said)
    assert any(line.startswith("warning: checkpoint 0_4 was not saved") for line in said)
    train(tmp_path / "two", every=2)
    full[0] = False
    assert same(train(tmp_path / "one"), train(tmp_path / "whole"))


# Several processes


def test_ranks_with_other_facts_are_refused_on_all_of_them(tmp_path: Path) -> None:
    def work(rank: int, exchange: Exchange) -> Any:
        rollforward.open_run(tmp_path, rank=rank, world_size=2, all_gather=exchange, facts={"seed": rank})

    results = LockStep(2).run(work)
    assert [type(result) for result in results] == [InputError, InputError]
    assert all("rank 1 has other facts: seed changed from 0 to 1" in str(result) for result in results)


def test_another_number_of_processes_is_refused_on_all_of_them() -> None:
    disk = SimulatedDisk()
    with pytest.MonkeyPatch.context() as patch:
        write_at_once(patch)
        run_loop(LocalStorage("/run", disk), Work())

        def work(rank: int, exchange: Exchange) -> Any:
            run_loop(LocalStorage("/run", disk), Work(), rank=rank, world_size=2, exchange=exchange)

        for result in LockStep(2).run(work):
            assert isinstance(result, CheckpointMismatch)
            assert "saved by 1 processes, and there are 2 now" in result.message


@pytest.mark.parametrize("error", [StorageError("the disk is full"), KeyError("a fault")])
@pytest.mark.parametrize("where", ["looking", "appender", "write"])
def test_what_fails_on_one_rank_reaches_the_other(
    error: Exception, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the restore, where the journal begins, and in the first checkpoint."""
    disk = SimulatedDisk()
    if where == "looking":
        monkeypatch.setattr("rollforward.replay.running.named_positions", _raiser(error))

    def work(rank: int, exchange: Exchange) -> Any:
        storage = LocalStorage("/run", disk)
        if rank == 0 and where != "looking":
            setattr(storage, where, _raiser(error))
        run_loop(storage, Work(), rank=rank, world_size=2, exchange=exchange)

    own, other = LockStep(2).run(work)
    assert own is error or own.__cause__ is error
    assert type(other) is (StorageError if isinstance(error, StorageError) else RollforwardError)
    assert "rank 0: " in other.message


def _raiser(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail
