"""`rollforward copy`: a checkpoint exists at the target only when all of it is there, whenever it dies."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.errors import ConfigError, StorageError
from rollforward.position import Position
from rollforward.storage import Appender, Buffer, LocalStorage, ReadHandle, Storage, read_small
from rollforward.storage.objects import ObjectStorage
from rollforward.store.catalog import load_manifest, positions
from rollforward.store.copying import MARK, copy_checkpoint, copy_run
from rollforward.store.restoring import verify


class Disturbed:
    """A storage on which `before` is called with each operation and its path."""

    def __init__(self, storage: Storage, before: Callable[[str, str], None]) -> None:
        self._storage, self._before = storage, before

    def __str__(self) -> str:
        return str(self._storage)

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        self._before("write", path)
        return self._storage.write(path, buffers)

    def open(self, path: str) -> ReadHandle:
        self._before("open", path)
        return self._storage.open(path)

    def remove(self, path: str) -> None:
        self._before("remove", path)
        self._storage.remove(path)

    def appender(self, path: str) -> Appender:
        return self._storage.appender(path)

    def rewrite(self, path: str, buffers: Iterable[Buffer]) -> Appender:
        return self._storage.rewrite(path, buffers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def dies_after(count: int) -> Callable[[str, str], None]:
    """SIGKILL before the operation of this number that changes something."""
    left = [count]

    def before(operation: str, _path: str) -> None:
        if operation != "open":
            left[0] -= 1
            if left[0] < 0:
                raise Killed

    return before


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        found = Place(tmp_path_factory.mktemp("copying"))
        patch.chdir(found.root)
        found.train("run")
    return found


@pytest.fixture
def run(place: Place, tmp_path: Path) -> Path:
    """A run of its own that has ended: 0_0, 0_3, 1_1, 1_4, 2_0."""
    shutil.copytree(place.root / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(params=["folder", "bucket"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return LocalStorage(tmp_path / "copy")
    return ObjectStorage(MemoryStore(), "memory://copy")


def tree(storage: Storage, folder: str = "") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in storage.scan(folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        found |= (
            tree(storage, path)
            if entry.kind == "folder"
            else {path: read_small(storage, path, limit=1 << 30)}
        )
    return found


def of_the_run(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what is only of the machine."""
    return {
        path: content
        for path, content in files.items()
        if path.partition("/")[0] not in ("run.lock", "heartbeat")
    }


def whole_checkpoints(storage: Storage) -> list[str]:
    """Those there are; each is read and digested."""
    for position in positions(storage):
        verify(storage, load_manifest(storage, position))
    return [str(position) for position in positions(storage)]


def test_a_copy_has_every_byte_of_the_run_and_nothing_of_the_machine(run: Path, target: Storage) -> None:
    copied = copy_run(LocalStorage(run), target)
    assert tree(target) == of_the_run(tree(LocalStorage(run)))
    assert [str(position) for position in copied.checkpoints] == ["0_0", "0_3", "1_1", "1_4", "2_0"]
    assert copied.left_out == []


def test_killed_before_any_change_it_leaves_only_whole_checkpoints_and_goes_on(
    run: Path, target: Storage
) -> None:
    source, deaths = LocalStorage(run), 0
    while True:
        try:
            copy_run(source, Disturbed(target, dies_after(deaths)))
            break
        except Killed:
            deaths += 1
            whole_checkpoints(target)
    assert deaths > 8
    assert tree(target) == of_the_run(tree(source))


def test_what_is_there_is_not_sent_again(run: Path, target: Storage) -> None:
    copy_run(LocalStorage(run), target)
    assert copy_run(LocalStorage(run), target).files == 0


def test_a_copy_that_was_damaged_meanwhile_is_put_right(run: Path, target: Storage) -> None:
    source = LocalStorage(run)
    copy_run(source, target)
    for path in ("train/rank_0/policy_model_rank_0-2_0.safetensors", "metrics.jsonl"):
        damaged = bytearray(read_small(target, path, limit=1 << 30))
        damaged[-1] ^= 1
        target.write(path, [damaged])
    copy_run(source, target)
    assert tree(target) == of_the_run(tree(source))


def test_a_damaged_checkpoint_is_left_out_and_said(run: Path, target: Storage) -> None:
    path = run / "train/rank_0/policy_model_rank_0-1_4.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    copied = copy_run(LocalStorage(run), target)
    assert whole_checkpoints(target) == ["2_0", "1_1", "0_3", "0_0"]
    (line,) = copied.left_out
    assert "1_4" in line
    assert "digest" in line


def test_a_checkpoint_that_the_run_removes_meanwhile_is_left_out(run: Path, target: Storage) -> None:
    def prune(operation: str, path: str) -> None:
        if operation == "open" and path.startswith("optimizer/") and "-0_3." in path:
            (run / "commits/0_3.json").unlink(missing_ok=True)
            (run / path).unlink(missing_ok=True)

    copied = copy_run(Disturbed(LocalStorage(run), prune), target)
    assert whole_checkpoints(target) == ["2_0", "1_4", "1_1", "0_0"]
    assert any("0_3" in line for line in copied.left_out)


def test_a_file_that_comes_back_changed_is_an_error(run: Path, tmp_path: Path) -> None:
    target = LocalStorage(tmp_path / "copy")

    def spoil(operation: str, path: str) -> None:
        file = tmp_path / "copy" / path
        if operation == "open" and path == "metrics.jsonl" and file.exists():
            file.write_bytes(file.read_bytes()[:-1] + b"?")

    with pytest.raises(StorageError, match=r"metrics\.jsonl.*not what was sent"):
        copy_run(LocalStorage(run), Disturbed(target, spoil))
    assert whole_checkpoints(target) == []


def test_what_else_is_in_a_place_is_left_alone(run: Path, target: Storage) -> None:
    target.write("precious", [b"mine"])
    with pytest.raises(ConfigError, match="something else is there: precious"):
        copy_run(LocalStorage(run), target)
    assert tree(target) == {"precious": b"mine"}


def test_another_run_is_not_mixed_in(
    run: Path, place: Place, target: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.root)
    if not (place.root / "other").exists():
        place.train("other")
    copy_run(LocalStorage(run), target)
    with pytest.raises(ConfigError, match="something else is there"):
        copy_run(LocalStorage(place.root / "other"), target)
    assert tree(target) == of_the_run(tree(LocalStorage(run)))


def test_a_mark_that_nobody_can_read_is_said(run: Path, target: Storage) -> None:
    target.write(MARK, [b"{"])
    with pytest.raises(StorageError, match=MARK):
        copy_run(LocalStorage(run), target)


def test_one_checkpoint_alone_is_enough_to_go_on_from(run: Path, target: Storage) -> None:
    copied = copy_checkpoint(LocalStorage(run), target, Position(1, 1))
    assert copied.checkpoints == [Position(1, 1)]
    assert whole_checkpoints(target) == ["1_1"]
    assert {path.partition("/")[0] for path in tree(target)} <= {
        *("commits", "tables", "train", "optimizer", "ref", "model", "model.copy")
    }
    assert b"policy_model_rank_0-1_1.safetensors" in read_small(target, "train/rank_0/meta.json", limit=1000)


@pytest.mark.parametrize("through", ["folder", "bucket"])
def test_a_run_that_moves_in_mid_run_ends_with_the_same_bytes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    """Killed on one machine, copied with its journal, resumed on another: as if nothing had been."""
    monkeypatch.chdir(tmp_path)
    commit_at_once(monkeypatch)
    moving = Place(tmp_path)
    with pytest.raises(Killed):
        moving.train("run", ToyPackage(dies_at_update=7))
    between: Storage = LocalStorage(tmp_path / "between")
    if through == "bucket":
        between = ObjectStorage(MemoryStore(), "memory://between")
    copy_run(LocalStorage(tmp_path / "run"), between)
    shutil.rmtree(tmp_path / "run")
    copy_run(between, LocalStorage(tmp_path / "run"))
    moving.train("run", resume=True)
    assert moving.digests("run") == place.digests("run")


def test_the_verb_says_what_came_and_exits_1_when_something_was_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["copy", str(run), str(tmp_path / "copy")]) == 0
    assert "checkpoints there: 0_0, 0_3, 1_1, 1_4, 2_0" in capsys.readouterr().out
    assert main(["copy", str(run), str(tmp_path / "one"), "--checkpoint", "newest"]) == 0
    assert "checkpoints there: 2_0" in capsys.readouterr().out
    (run / "commits/1_4.json").write_bytes(b"{}")
    assert main(["copy", str(run), str(tmp_path / "again")]) == 1
    assert "1_4" in capsys.readouterr().err


def test_a_folder_in_which_a_trainer_runs_is_not_copied_into(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rollforward.store import RunLock

    with RunLock.acquire(tmp_path / "busy"):
        assert main(["copy", str(run), str(tmp_path / "busy")]) == 1
    assert "a trainer is running there" in capsys.readouterr().err
