"""Curves have every step once, however often a run was killed."""

import json
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from rollforward.errors import StorageError
from rollforward.position import Position
from rollforward.replay.metrics import FILE, before, read, read_from
from rollforward.run.metrics import Metrics, SaveTrouble, TensorBoard
from rollforward.storage import LocalStorage

STEPS_PER_EPOCH = 3
RECORD = {"epoch": 0, "step": 0, "global_step": 0, "incarnation": 1, "time": 1.5, "reward": 0.5}
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
        LocalStorage(folder),
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
    lines = [RECORD | {"reward": reward} for reward in (1.0, 2.0)]
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


NO_RECORDS = {
    "an epoch that is null": {"epoch": None},
    "a step that is true": {"step": True},
    "a step that is a float": {"step": 1.0},
    "a step that is a text": {"step": "1"},
    "a step that is a list": {"step": [1]},
    "a negative step": {"step": -1},
    "a step beyond all bounds": {"step": 10**18},
    "a global step that is null": {"global_step": None},
    "an incarnation that is a text": {"incarnation": "1"},
    "a time that is NaN": {"time": float("nan")},
    "a time that is missing": {"time": None},
    "a figure that is a text": {"reward": "good"},
    "a figure that is null": {"reward": None},
    "a figure of 400 digits": {"reward": 10**400},
    "a figure that is true": {"reward": True},
}


@pytest.mark.parametrize("why", NO_RECORDS)
def test_what_is_no_record_is_passed_over(tmp_path: Path, why: str) -> None:
    good = RECORD | {"step": 2, "global_step": 2}
    lines = [json.dumps(line) for line in (RECORD | NO_RECORDS[why], good)]
    (tmp_path / FILE).write_text("\n".join(lines))
    assert read(tmp_path / FILE) == [good]
    # And a run that is resumed goes on, curves included.
    run_steps(open_metrics(tmp_path, start=Position(1, 0), incarnation=2, board=True), 3, 4)
    assert steps_in(tmp_path) == [2, 3]


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b"7",
        b"null",
        b'"epoch"',
        b"{}",
        b"[" * 100_000,
        b"\xff\xfe",
        b"\0" * 99,
        b'{"epoch":' + b"9" * 5000,
    ],
    ids=["list", "number", "null", "text", "empty", "nesting", "bytes", "zeros", "digits"],
)
def test_a_line_of_anything_else_is_passed_over(tmp_path: Path, line: bytes) -> None:
    (tmp_path / FILE).write_bytes(line + b"\n" + json.dumps(RECORD).encode() + b"\n" + line)
    assert read(tmp_path / FILE) == [RECORD]


def test_without_a_file_there_are_no_records(tmp_path: Path) -> None:
    assert read(tmp_path / FILE) == []
    assert read_from(LocalStorage(tmp_path / "nowhere")) == []


def test_a_folder_in_the_files_place_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        read(tmp_path / FILE)


def test_a_disk_that_refuses_a_line_is_not_passed_over(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path, start=Position(0, 0), incarnation=1)
    metrics.close()
    with pytest.raises(StorageError, match=r"appending to .*metrics\.jsonl"):
        metrics.step(Position(0, 0), FIGURES)
