"""Curves have every step once, however often a run was killed."""

import json
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.run.metrics import FILE, Metrics, SaveTrouble, TensorBoard, before, read

STEPS_PER_EPOCH = 3
FIGURES = {"reward": 0.5, "tokens": 100.0, "seconds/generate": 2.0, "seconds/update": 2.0}


def open_metrics(
    folder: Path,
    *,
    start: Position,
    incarnation: int,
    board: bool = False,
    trouble: SaveTrouble | None = None,
) -> Metrics:
    kept = before(read(folder / FILE), start)
    return Metrics(
        folder,
        kept=kept,
        incarnation=incarnation,
        steps_per_epoch=STEPS_PER_EPOCH,
        tensorboard=TensorBoard(folder / "board", kept=kept) if board else None,
        trouble=trouble or SaveTrouble(),
    )


def run_steps(metrics: Metrics, start: int, end: int) -> None:
    for step in range(start, end):
        metrics.step(Position(*divmod(step, STEPS_PER_EPOCH)), FIGURES)
    metrics.close()


def steps_in(folder: Path) -> list[int]:
    return [record["global_step"] for record in read(folder / FILE)]


def points(folder: Path, tag: str) -> list[int]:
    """Steps of the points on a curve, over all event files, as TensorBoard would read them."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        at = 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + length])
            found += [event.step for value in event.summary.value if value.tag == tag]
            at += 12 + length + 4
    return found


def test_a_resumed_run_has_no_step_twice_and_none_missing(tmp_path: Path) -> None:
    run_steps(open_metrics(tmp_path, start=Position(0, 0), incarnation=1), 0, 5)
    run_steps(open_metrics(tmp_path, start=Position(1, 0), incarnation=2), 3, 8)
    assert steps_in(tmp_path) == list(range(8))
    assert [record["incarnation"] for record in read(tmp_path / FILE)] == [1, 1, 1, 2, 2, 2, 2, 2]


def test_a_line_that_a_kill_tore_is_cut(tmp_path: Path) -> None:
    run_steps(open_metrics(tmp_path, start=Position(0, 0), incarnation=1), 0, 3)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes() + b'{"epoch":1,"step":0,"glob')
    run_steps(open_metrics(tmp_path, start=Position(1, 0), incarnation=2), 3, 5)
    assert steps_in(tmp_path) == list(range(5))
    for line in path.read_text().splitlines():
        json.loads(line)


def test_of_two_records_of_one_step_the_later_counts(tmp_path: Path) -> None:
    lines = [{"epoch": 0, "step": 0, "reward": reward} for reward in (1.0, 2.0)]
    (tmp_path / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["reward"] for record in read(tmp_path / FILE)] == [2.0]


def test_a_record_says_where_it_belongs_and_how_fast_it_was(tmp_path: Path) -> None:
    run_steps(open_metrics(tmp_path, start=Position(0, 0), incarnation=4), 4, 5)
    (record,) = read(tmp_path / FILE)
    assert {"epoch": 1, "step": 1, "global_step": 4, "incarnation": 4}.items() <= record.items()
    assert record["tokens_per_second"] == 25.0
    assert record["reward"] == 0.5


def test_tensorboard_curves_are_rewritten_not_doubled(tmp_path: Path) -> None:
    run_steps(open_metrics(tmp_path, start=Position(0, 0), incarnation=1, board=True), 0, 5)
    run_steps(open_metrics(tmp_path, start=Position(1, 0), incarnation=2, board=True), 3, 7)
    assert points(tmp_path / "board", "reward") == list(range(7))
    assert points(tmp_path / "board", "global_step") == []


def test_trouble_with_a_checkpoint_is_told_once_in_the_record_of_its_step(tmp_path: Path) -> None:
    trouble = SaveTrouble()
    metrics = open_metrics(tmp_path, start=Position(0, 0), incarnation=1, trouble=trouble)
    for step, (failed, suspicious) in enumerate([(0, 0), (2, 1), (0, 0)]):
        trouble.failed += failed
        trouble.suspicious += suspicious
        metrics.step(Position(0, step), FIGURES)
    metrics.close()
    assert [record["saves_failed"] for record in read(tmp_path / FILE)] == [0, 2, 0]
    assert [record["saves_suspicious"] for record in read(tmp_path / FILE)] == [0, 1, 0]


def test_trouble_that_shows_after_the_last_step_is_not_lost(tmp_path: Path) -> None:
    trouble = SaveTrouble()
    metrics = open_metrics(tmp_path, start=Position(0, 0), incarnation=1, board=True, trouble=trouble)
    trouble.suspicious = 1
    metrics.step(Position(0, 0), FIGURES)
    trouble.failed = trouble.suspicious = 1
    metrics.close()
    (record,) = read(tmp_path / FILE)
    assert (record["saves_failed"], record["saves_suspicious"], record["reward"]) == (1, 2, 0.5)
    assert points(tmp_path / "board", "saves_suspicious") == [0, 0]
    assert points(tmp_path / "board", "reward") == [0]


def test_event_files_of_others_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "board" / "events.out.tfevents.1.somebody"
    other.parent.mkdir()
    other.write_bytes(b"")
    run_steps(open_metrics(tmp_path, start=Position(0, 0), incarnation=1, board=True), 0, 1)
    assert other.exists()


def test_a_disk_that_refuses_a_line_is_not_passed_over(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path, start=Position(0, 0), incarnation=1)
    metrics.close()
    with pytest.raises(StorageError, match=r"appending to .*metrics\.jsonl"):
        metrics.step(Position(0, 0), FIGURES)
