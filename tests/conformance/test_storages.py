"""What every storage promises: the real file system and the simulated disk under the same suite."""

import os
from pathlib import Path

import pytest
from simulated_disk import SimulatedDisk

from rollforward.errors import StorageError
from rollforward.storage import LocalStorage, OsFiles, Storage, read_small


@pytest.fixture(params=["local", "simulated"])
def storage(request, tmp_path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path / "run", OsFiles())
    return LocalStorage("/data/run", SimulatedDisk())


def link(storage: LocalStorage, path: str, target: str) -> None:
    if isinstance(storage._ops, SimulatedDisk):
        storage._ops.symlink(f"{storage.root}/{path}", target)
    else:
        Path(storage.root, path).symlink_to(target)


def test_a_written_file_reads_back_whole(storage):
    assert storage.write("a/b/c.bin", [b"one", bytearray(b"two"), memoryview(b"three"), b""]) == 11
    assert read_small(storage, "a/b/c.bin", limit=11) == b"onetwothree"


def test_writing_again_replaces_the_file_as_a_whole(storage):
    storage.write("f", [b"a longer first text"])
    storage.write("f", [b"short"])
    assert read_small(storage, "f", limit=100) == b"short"


def test_nothing_but_the_file_is_left_behind(storage):
    storage.write("folder/f", [b"1"])
    assert [entry.name for entry in storage.scan("folder")] == ["f"]


def test_content_that_raises_leaves_the_old_file_and_no_temporary(storage):
    def broken():
        yield b"half"
        raise RuntimeError("the engine went away")

    storage.write("folder/f", [b"old"])
    with pytest.raises(RuntimeError):
        storage.write("folder/f", broken())
    assert read_small(storage, "folder/f", limit=3) == b"old"
    assert [entry.name for entry in storage.scan("folder")] == ["f"]


def test_reading_at_an_offset_fills_just_the_buffer(storage):
    storage.write("f", [bytes(range(200))])
    buffer = bytearray(7)
    with storage.open("f") as handle:
        assert handle.size == 200
        handle.read_into(memoryview(buffer), 50)
    assert buffer == bytes(range(50, 57))


def test_reading_past_the_end_is_an_error(storage):
    storage.write("f", [b"12345"])
    with storage.open("f") as handle, pytest.raises(StorageError, match="ends at byte 5"):
        handle.read_into(memoryview(bytearray(3)), 3)


def test_opening_what_is_not_there_says_so_with_a_hint(storage):
    with pytest.raises(StorageError, match=r"opening .*missing: No such file.*ENOENT") as caught:
        storage.open("missing")
    assert caught.value.hint


def test_stat_and_scan_tell_files_from_folders(storage):
    storage.write("a/f", [b"xyz"])
    storage.write("a/b/g", [b""])
    assert [(entry.name, entry.kind, entry.size) for entry in storage.scan("a")] == [
        ("b", "folder", 0),
        ("f", "file", 3),
    ]
    assert storage.stat("a/f").size == 3
    assert storage.stat("a").kind == "folder"
    assert storage.stat("nothing") is None
    assert storage.stat("a/f/below") is None
    assert storage.scan("nothing") == []
    assert [entry.name for entry in storage.scan("")] == ["a"]


def test_removing_twice_is_no_error(storage):
    storage.write("a/f", [b""])
    storage.remove("a/f")
    storage.remove("a/f")
    storage.sync_folder("a")
    assert storage.scan("a") == []
    storage.write("a/f", [b"again"])
    assert read_small(storage, "a/f", limit=5) == b"again"


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a\\b", "a\x00b", "", "a/" + "n" * 256]
)
def test_a_path_that_leads_out_is_refused_by_every_call(storage, path):
    for call in (storage.open, storage.stat, storage.remove, lambda name: storage.write(name, [b""])):
        with pytest.raises(StorageError, match="refusing a path"):
            call(path)


def test_a_symbolic_link_is_never_read_through(storage):
    storage.write("real/f", [b"secret"])
    link(storage, "real/file_link", f"{storage.root}/real/f")
    link(storage, "folder_link", f"{storage.root}/real")
    assert storage.stat("folder_link").kind == "link"
    for path in ("real/file_link", "folder_link/f"):
        with pytest.raises(StorageError):
            storage.open(path)


def test_a_symbolic_link_is_never_written_through(storage):
    storage.write("real/f", [b"kept"])
    link(storage, "folder_link", f"{storage.root}/real")
    with pytest.raises(StorageError):
        storage.write("folder_link/f", [b"changed"])
    assert read_small(storage, "real/f", limit=7) == b"kept"


def test_nothing_is_removed_through_a_symbolic_link(storage):
    storage.write("real/f", [b"kept"])
    link(storage, "folder_link", f"{storage.root}/real")
    with pytest.raises(StorageError, match="symbolic link"):
        storage.remove("folder_link/f")
    assert storage.stat("real/f")


def test_a_file_in_the_place_of_a_folder_is_named(storage):
    storage.write("train", [b""])
    with pytest.raises(StorageError, match="a file is in the way"):
        storage.write("train/rank_0/f", [b""])


def test_a_larger_file_than_expected_is_not_read(storage):
    storage.write("f", [b"123456"])
    with pytest.raises(StorageError, match="6 bytes, where at most 5"):
        read_small(storage, "f", limit=5)


def test_a_named_pipe_does_not_hang_the_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="not a regular file"):
        LocalStorage(tmp_path).open("pipe")


def test_the_durable_write_makes_its_calls_in_the_promised_order():
    disk = SimulatedDisk()
    LocalStorage("/run", disk).write("train/f", [b"one", b"two"])
    kinds = [(op.kind, op.path.rpartition("/")[2] if op.kind != "fsync" else "") for op in disk.log]
    temporary = next(name for kind, name in kinds if kind == "create")
    assert kinds == [
        ("mkdir", "run"),
        ("fsync_folder", ""),
        ("mkdir", "train"),
        ("fsync_folder", "run"),
        ("create", temporary),
        ("write", temporary),
        ("write", temporary),
        ("fsync", ""),
        ("rename", temporary),
        ("fsync_folder", "train"),
    ]


def test_a_failed_fsync_is_not_tried_again():
    disk = SimulatedDisk()
    calls = []

    def fail(call, path):
        if call == "fsync":
            calls.append(path)
            raise OSError(5, "Input/output error")

    disk.fail = fail
    with pytest.raises(StorageError, match="syncing"):
        LocalStorage("/run", disk).write("f", [b"data"])
    assert len(calls) == 1
    assert [path for path, content in disk.tree().items() if content is not None] == []


def test_short_writes_are_continued():
    disk = SimulatedDisk()
    disk.short_write = 3
    storage = LocalStorage("/run", disk)
    storage.write("f", [b"0123456789"])
    assert read_small(storage, "f", limit=10) == b"0123456789"
