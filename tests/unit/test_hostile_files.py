"""Files that are not what they should be: refused at once, in bounded memory, and shown without harm."""

import contextlib
import io
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_folders import MARK, frames_of, segment_of
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.errors import CheckpointInvalid, CheckpointMismatch, RollforwardError, StorageError
from rollforward.interop.files import read_layout
from rollforward.interop.mapping import fit
from rollforward.interop.strategies import find_strategy
from rollforward.position import Position
from rollforward.processes import heartbeat
from rollforward.replay import metrics
from rollforward.replay import report as recovery_report
from rollforward.storage import LocalStorage, read_lines
from rollforward.store import find, list_checkpoints, strictjson
from rollforward.store.digests import digest
from rollforward.store.journal.frames import MAGIC
from rollforward.store.journal.reading import read_journal
from rollforward.store.lock import RunLock, newest_incarnation
from rollforward.tensors import TensorSpec
from rollforward.wording import plain, plain_lines

MB = 1_000_000


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A run that was killed between its checkpoints 1_1 and 1_4."""
    monkeypatch.chdir(tmp_path)
    commit_at_once(monkeypatch)
    place = Place(tmp_path)
    with contextlib.suppress(Killed):
        place.train("run", ToyPackage(dies_at_update=8))
    return place


@contextlib.contextmanager
def little_memory(limit: int = 300 * MB) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def said(*arguments: str, terminal: bool = False) -> tuple[int, str]:
    """Exit code and all output of a verb."""
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(list(arguments))
    assert "--debug" not in out.getvalue()
    return code, out.getvalue()


def replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def seal(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a manifest and give it the digest of what it says now."""
    value = json.loads(path.read_bytes())
    del value["digest"]
    edit(value)
    body = json.dumps(value).encode()[:-1]
    path.write_bytes(body + f',"digest":"{digest(body)}"}}\n'.encode())


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


OTHER_KINDS = [os.mkfifo, Path.mkdir, lambda p: p.symlink_to(p), lambda p: p.symlink_to("/dev/zero")]


@pytest.mark.parametrize("make", OTHER_KINDS, ids=["pipe", "folder", "loop", "device"])
@pytest.mark.parametrize(
    "name", ["train/rank_0/meta.json", "metrics.jsonl", "recoveries.jsonl", "commits/1_1.json", "guests.json"]
)
def test_a_pipe_a_folder_or_a_link_in_place_of_a_file_holds_nobody_up(
    place: Place, name: str, make: Callable[[Path], Any]
) -> None:
    path = place.root / "run" / name
    path.unlink(missing_ok=True)
    make(path)
    for verb in ("inspect", "verify", "history"):
        said(verb, str(place.root / "run"))
    said("doctor", "--actor_checkpoint_path", str(place.root / "run" / "train"))
    # Either it goes on, or it says why not.
    with contextlib.suppress(RollforwardError):
        place.train("run", resume=True)


@pytest.mark.parametrize("make", OTHER_KINDS[:2], ids=["pipe", "folder"])
def test_a_segment_that_is_not_a_file_is_damage(place: Place, make: Callable[[Path], Any]) -> None:
    replace(place.root / "run" / "journal" / "rank_0" / "1-1_1.journal", make)
    code, told = said("verify", "--deep", str(place.root / "run"))
    assert code == 1
    assert "not a file" in told


def test_a_folder_of_an_absurd_rank_takes_no_memory(place: Place) -> None:
    for number in (99_999_999, 999_999_999_999):
        (place.root / "run" / "train" / f"rank_{number}").mkdir()
    with little_memory(20 * MB):
        _, told = said("doctor", "--actor_checkpoint_path", str(place.root / "run" / "train"))
    assert "no folder for rank 1 to 99999998, 100000000 to 999999999998" in told


def test_a_file_with_the_last_number_of_a_start_has_one_verdict_at_the_start(place: Place) -> None:
    """It used to train to its first checkpoint and fail there, while verify said valid."""
    odd = place.root / "run" / "journal" / "rank_0" / "999999999999999999-0_0.journal"
    odd.touch()
    with pytest.raises(StorageError, match=odd.name):
        place.plan("run", resume=True)
    with pytest.raises(StorageError, match=odd.name):
        RunLock.acquire(place.root / "run")
    code, told = said("verify", "--deep", str(place.root / "run"))
    assert code == 1
    assert odd.name in told
    assert odd.name in said("doctor", "--actor_checkpoint_path", str(place.root / "run" / "train"))[1]
    odd.unlink()
    place.train("run", resume=True)


def test_a_manifest_with_the_number_of_no_start_is_invalid(place: Place) -> None:
    seal(place.root / "run" / "commits" / "1_1.json", lambda value: value.update(incarnation=10**18))
    assert "incarnation is absurd" in list_checkpoints(LocalStorage(place.root / "run"))[0].reason
    assert newest_incarnation(place.root / "run") == 1


def test_a_lock_longer_than_its_record_is_refused_and_left_as_it_is(place: Place) -> None:
    lock = place.root / "run" / "run.lock"
    content = lock.read_bytes() + bytes(5000)
    lock.write_bytes(content)
    with pytest.raises(StorageError, match=r"run\.lock has 5512 bytes, and a run's lock has 512"):
        place.train("run", resume=True)
    assert lock.read_bytes() == content


def test_manifests_of_a_gigabyte_of_zeros_are_not_read(place: Place) -> None:
    for step in range(100):
        sparse(place.root / "run" / "commits" / f"9_{step}.json", 1 << 30)
    with little_memory(20 * MB):
        code, told = said("verify", str(place.root / "run"))
    assert code == 1
    assert told.count("does not end with its digest") == 100
    place.train("run", resume=True)


def test_a_manifest_that_is_too_large_is_not_read(place: Place) -> None:
    path = place.root / "run" / "commits" / "1_1.json"
    tail = path.read_bytes()[-46:]
    with path.open("r+b") as file:
        file.truncate(1 << 30)
        file.seek((1 << 30) - 46)
        file.write(tail)
    with little_memory(20 * MB):
        assert "at most" in said("verify", str(place.root / "run"))[1]


@pytest.mark.parametrize(
    "header",
    [b"{}", b'{"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', b'"%x":[[],[],[]]', b'"%x":{}'],
    ids=["blanks", "entries", "lists", "objects"],
)
def test_a_header_of_99_megabytes_takes_no_gigabytes(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    many = b",".join(
        header.lstrip(b"{") % number if b"%" in header else b"" for number in range(30 * MB // len(header))
    )
    for size in (99 * MB, 30 * MB):
        text = (b"{" + many + b"}").ljust(size)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with little_memory(500 * MB), contextlib.suppress(CheckpointInvalid):
            read_layout(path)


def test_a_shape_that_no_array_can_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps(
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62, 0], "data_offsets": [0, 0]}}
    ).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointInvalid, match="absurd"):
        read_layout(path)


@pytest.mark.parametrize(
    "front", [b"", MAGIC + (39 << 30).to_bytes(8, "little") + bytes(24)], ids=["zeros", "frame"]
)
def test_a_journal_with_a_sparse_tail_of_40_gigabytes_is_damage_at_once(place: Place, front: bytes) -> None:
    path = max((place.root / "run" / "journal" / "rank_0").glob("*.journal"))
    with path.open("ab") as file:
        file.write(front)
    os.truncate(path, 40 << 30)
    with little_memory(100 * MB):
        code, told = said("verify", "--deep", str(place.root / "run"))
        assert code == 1
        assert "more than a crash can spoil" in told
        for verb in ("history", "inspect", "prune"):
            said(verb, str(place.root / "run"), *(["--dry_run"] if verb == "prune" else []))
    place.train("run", resume=True)


def test_a_frame_of_half_a_gigabyte_that_a_sparse_file_claims_takes_no_memory(place: Place) -> None:
    path = max((place.root / "run" / "journal" / "rank_0").glob("*.journal"))
    sequence = frames_of(path.read_bytes())[-1][0] + 1
    with path.open("ab") as file:
        file.write(MAGIC + (500 << 20).to_bytes(8, "little") + sequence.to_bytes(8, "little") + bytes(16))
        file.truncate(file.tell() + (500 << 20))
    with little_memory(100 * MB):
        view = read_journal([LocalStorage(place.root / "run")], rank=0, since=Position(0, 0))
    assert [segment.name.path for segment, _ in view.torn] == [str(path.relative_to(place.root / "run"))]


def test_a_tail_full_of_what_looks_like_frames_is_damage_and_takes_no_hours(place: Place) -> None:
    path = max((place.root / "run" / "journal" / "rank_0").glob("*.journal"))
    sequence = frames_of(path.read_bytes())[-1][0] + 1
    fake = MAGIC + (20 << 20).to_bytes(8, "little") + sequence.to_bytes(8, "little") + bytes(16)
    path.write_bytes(path.read_bytes() + fake * (24 * MB // len(fake)))
    code, told = said("verify", "--deep", str(place.root / "run"))
    assert code == 1
    assert "damaged at byte" in told


@pytest.mark.parametrize(
    "change",
    [
        {"completion_width": str(1 << 29)},
        {"completion_width": "5"},
        {"prompt_width": "7"},
        {"completion_pad": "99999999999"},
        {"prompt_pad": "-1"},
    ],
    ids=str,
)
def test_a_record_that_contradicts_itself_is_generated_again(place: Place, change: dict[str, str]) -> None:
    """Its digest is right; it used to raise in training."""
    place.train("whole")
    path = max((place.root / "run" / "journal" / "rank_0").glob("*.journal"))
    frames = frames_of(path.read_bytes())
    for number, (sequence, unsynced, payload) in enumerate(frames):
        length = int.from_bytes(payload[:8], "little")
        header = json.loads(payload[8 : 8 + length])
        if header["__metadata__"]["kind"] == "rollouts":
            header["__metadata__"] |= change
            text = json.dumps(header).encode()
            frames[number] = (
                sequence,
                unsynced,
                len(text).to_bytes(8, "little") + text + payload[8 + length :],
            )
    path.write_bytes(segment_of(frames))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        place.train("run", resume=True)
    assert "is generated again: " in out.getvalue()
    assert place.digests("run") == place.digests("whole")


@pytest.mark.parametrize(
    "name", ["prompt_ids", "completion_ids", "prompt_of", "prompt_indices", "completion_lengths"]
)
def test_a_record_with_numbers_out_of_range_is_generated_again(place: Place, name: str) -> None:
    place.train("whole")
    path = max((place.root / "run" / "journal" / "rank_0").glob("*.journal"))
    frames = frames_of(path.read_bytes())
    for number, (sequence, unsynced, payload) in enumerate(frames):
        length = int.from_bytes(payload[:8], "little")
        entry = json.loads(payload[8 : 8 + length]).get(name)
        if entry is not None:
            at = 8 + length + entry["data_offsets"][0]
            frames[number] = sequence, unsynced, payload[:at] + b"\xfe\x7f" + payload[at + 2 :]
    path.write_bytes(segment_of(frames))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        place.train("run", resume=True)
    assert "is generated again: " in out.getvalue()
    assert place.digests("run") == place.digests("whole")


BAD_LINES = [
    "[]",
    "1",
    "null",
    '"x"',
    "[" * 100_000,
    '{"a":' * 100_000,
    '{"epoch":NaN}',
    "1e999",
    "1" * 5000,
    '{"incarnation":1e999,"checkpoint":"0_0"}',
    '{"epoch":0,"step":1,"global_step":1,"incarnation":1,"time":"x"}',
    '{"epoch":true,"step":0,"global_step":0,"incarnation":0,"time":0}',
    "\\ud800",
    "\x00\x01",
]


@pytest.mark.parametrize("name", ["metrics.jsonl", "recoveries.jsonl"])
def test_lines_of_other_kinds_are_passed_over(place: Place, name: str) -> None:
    place.train("run", resume=True, rl_config__max_steps=9)
    path = place.root / "run" / name
    whole = path.read_text()
    storage = LocalStorage(place.root / "run")
    before = metrics.read(path), recovery_report.read(storage)
    known = json.loads(whole.splitlines()[0])
    odd = [json.dumps({**known, key: value}) for key in known for value in ([], {"a": 1}, 10**400, "\ud800")]
    path.write_text("\n".join([*BAD_LINES, *odd, whole]))
    assert len(metrics.read(path)) == len(before[0])
    found = recovery_report.read(storage)
    assert [each.incarnation for each in found][-len(before[1]) :] == [each.incarnation for each in before[1]]
    said("history", str(place.root / "run"))
    place.train("run", resume=True)


def test_a_line_without_end_is_read_in_pieces(tmp_path: Path) -> None:
    sparse(tmp_path / "x", 1 << 28)
    with (tmp_path / "x").open("ab") as file:
        file.write(b"\nlast\n\nunfinished")
    with little_memory(20 * MB):
        found = list(read_lines(LocalStorage(tmp_path), "x", limit=1 << 30, longest=1000))
    assert found == [b"last", b"", b"unfinished"]


def test_lines_across_pieces_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollforward.storage.base._PIECE_BYTES", 7)
    lines = [b"x" * (number % 23) for number in range(60)]
    (tmp_path / "x").write_bytes(b"\n".join(lines))
    found = list(read_lines(LocalStorage(tmp_path), "x", limit=1 << 20, longest=20))
    assert found == [line for line in lines if len(line) <= 20]


@pytest.mark.parametrize("key", ["step", "epoch", "global_step"])
def test_a_bit_in_the_last_line_of_metrics_loses_no_steps(
    place: Place, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = place.root / "run" / "metrics.jsonl"
    *others, last = path.read_text().splitlines()
    record = json.loads(last)
    path.write_text("\n".join([*others, json.dumps(record | {key: record[key] + 32})]) + "\n")
    place.train("run", resume=True)
    assert "lost: nothing" in capsys.readouterr().out


def test_metrics_of_400_digits_are_no_figures(place: Place) -> None:
    seal(
        place.root / "run" / "commits" / "1_1.json",
        lambda value: value["state"].update(metrics={"reward": 10**400, "x": True, "y": 2}),
    )
    assert find(LocalStorage(place.root / "run")).manifest.metrics == {"y": 2.0}
    assert said("inspect", str(place.root / "run"))[0] == 0


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_manifest_says_does_nothing_to_a_terminal(place: Place, terminal: bool) -> None:
    """Markup used to end `inspect` with an error, and escape sequences reached the terminal."""

    def edit(value: dict[str, Any]) -> None:
        value.update(created=f"[/x]{MARK}", run_id=f"[red]{MARK}")

    seal(place.root / "run" / "commits" / "1_1.json", edit)
    (place.root / "run" / "commits" / "0_3.json").write_bytes(MARK.encode())
    run = str(place.root / "run")
    for arguments in (["inspect", run], ["verify", run], ["history", run], ["prune", "--dry_run", run]):
        code, told = said(*arguments, terminal=terminal)
        assert code in (0, 1)
        assert "\x07" not in told
        assert "\x1b]" not in told


def test_the_log_shows_control_characters_escaped(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    lock = place.root / "run" / "run.lock"
    owner = json.loads(lock.read_bytes()) | {"host": MARK, "held": True}
    lock.write_bytes(json.dumps(owner).encode())
    place.train("run", resume=True)
    log = next(place.root.rglob("train.log")).read_text()
    for told in (capsys.readouterr().out, log):
        assert "\\x1b]0;owned\\x07" in told
        assert "\x07" not in told


def test_text_of_files_is_shown_plain() -> None:
    assert (
        plain(f"a{MARK}\n\t\x7f\x9b\u202eb\udcff") == "a\\x1b]0;owned\\x07\\x0a\\x09\\x7f\\x9b\\u202eb\\udcff"
    )
    assert plain_lines("a\tb\r\nc") == "a\tb\\x0d\nc"
    assert plain("Grüße 中文 \\x1b") == "Grüße 中文 \\x1b"


def test_a_folder_whose_name_is_not_utf8_is_shown_and_resumed(place: Place) -> None:
    name = os.fsdecode(b"r\xff\xfe")
    (place.root / "run").rename(place.root / name)
    for terminal in (True, False):
        code, told = said("verify", str(place.root / name), terminal=terminal)
        assert code == 0
    code, told = said("verify", str(place.root / name / "nothing"))
    assert "r\\udcff\\udcfe" in told
    place.train(name, resume=True)


@pytest.mark.parametrize(
    "text",
    ["1e999", '{"a":-1e400}', "NaN", '{"a":1,"a":2}', "[" * 9999, "1" * 9999, "[[],[]" * 10],
    ids=range(7),
)
def test_json_that_two_readers_could_understand_differently_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        strictjson.parse(text.encode())


def test_json_of_more_values_than_expected_is_refused_before_it_is_parsed() -> None:
    text = b"[" + b"[]," * 9_999_999 + b"[]]"
    with little_memory(MB), pytest.raises(ValueError, match="at most 2000000"):
        strictjson.parse(text)


def test_a_version_that_is_true_is_refused(place: Place) -> None:
    seal(place.root / "run" / "commits" / "1_1.json", lambda value: value.update(version=True))
    assert "its version is True" in list_checkpoints(LocalStorage(place.root / "run"))[0].reason


def test_a_broken_list_of_guests_is_noticed_before_training(place: Place) -> None:
    (place.root / "run" / "guests.json").write_text('[["../x","0_1"]]')
    with pytest.raises(StorageError, match=r"guests\.json"):
        place.plan("run", resume=True)


PULSE = b'{"phase":%s,"position":"%s","incarnation":1,"pid":1,"time":%s}'


@pytest.mark.parametrize(
    "content",
    [
        *(b"[]", b"{}", b"[" * 9999, b"x" * 9999),
        *(PULSE % (b"1", b"0_0", b"1"), PULSE % (b'"x"', b"x", b"1"), PULSE % (b'"x"', b"0_0", b"1e99")),
    ],
)
def test_a_heartbeat_of_another_kind_is_none(tmp_path: Path, content: bytes) -> None:
    path = heartbeat.file_of(tmp_path, 0)
    path.parent.mkdir()
    path.write_bytes(content)
    assert heartbeat.read(tmp_path, 0) is None


def varint(value: int) -> bytes:
    found = b""
    while value >= 0x80:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


@pytest.mark.parametrize(
    "dims",
    [b"\x08" + varint(1 << 62) + b"\x08\x00", b"\x08\x01" * 100_000, message(1, b"\x01" * 9_000_000)],
    ids=["huge", "many", "packed"],
)
def test_a_ckpt_with_absurd_dimensions_is_refused_at_once(tmp_path: Path, dims: bytes) -> None:
    tensor = dims * (3 if len(dims) < 99 else 1) + message(2, b"Float32") + message(3, b"")
    (tmp_path / "x.ckpt").write_bytes(message(1, message(1, b"a") + message(2, tensor)))
    with little_memory(60 * MB), pytest.raises(CheckpointInvalid):
        read_layout(tmp_path / "x.ckpt")


def test_a_ckpt_of_millions_of_pieces_is_refused_in_seconds(tmp_path: Path) -> None:
    value = message(1, message(1, b"a") + message(2, message(2, b"Int8") + message(3, b"x")))
    (tmp_path / "x.ckpt").write_bytes(value * 400_000)
    with pytest.raises(CheckpointInvalid, match="more than 2000000"):
        read_layout(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "grid", [b"\x08\x02" * 50_000, (b"\x08" + varint(1 << 40)) * 30], ids=["many", "huge"]
)
def test_a_strategy_file_with_an_absurd_grid_is_refused_at_once(tmp_path: Path, grid: bytes) -> None:
    layout = message(1, grid) + message(2, b"\x08\x00") + b"\x28\x00\x30\x00\x38\x00"
    (tmp_path / "strategy_0.ckpt").write_bytes(message(3, message(1, b"a") + message(2, layout)))
    with pytest.raises(CheckpointMismatch, match="not a strategy file"):
        find_strategy([tmp_path])


def test_a_loop_of_links_is_no_folder_of_a_run(place: Place) -> None:
    loop = place.root / "loop"
    loop.symlink_to(loop)
    assert said("verify", str(loop))[0] == 2
    with pytest.raises(RollforwardError):
        place.train("loop", resume=True, source="run")


def test_rollouts_of_a_run_without_its_model_are_token_ids(place: Place) -> None:
    """Found by the fuzzer: an error that was not ours."""

    def edit(value: dict[str, Any]) -> None:
        value["attachments"] = []

    seal(place.root / "run" / "commits" / "1_1.json", edit)
    code, told = said("rollouts", str(place.root / "run"), "--step", "1_1")
    assert code == 0
    assert "carries no config.json" in told


def test_history_reads_each_journal_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the fuzzer: three times through a sparse file of a gigabyte took longer than ten seconds."""
    opened: list[str] = []
    read = LocalStorage.open

    def open_and_note(self: LocalStorage, path: str) -> Any:
        opened.append(path)
        return read(self, path)

    monkeypatch.setattr(LocalStorage, "open", open_and_note)
    said("history", str(place.root / "run"))
    journals = [path for path in opened if path.endswith(".journal")]
    assert journals
    assert len(set(journals)) == len(journals)


def test_a_second_moment_below_zero_is_damage() -> None:
    """Found by the fuzzer: a flipped sign bit in another trainer's file made the weights NaN."""
    own = {"adam_v.a": TensorSpec.whole(np.float32, (3,))}
    bad = {"adam_v.a": np.array([1, -1, 0], np.float32)}
    with pytest.raises(CheckpointInvalid, match=r"adam_v\.a holds negative values"):
        fit("optimizer", bad, {"policy_model": {}, "optimizer": own, "ref": {}}, 1)
