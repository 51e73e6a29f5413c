"""What every storage promises, as tests over a fixture `storage`."""

import random
from contextlib import suppress

import pytest

from rollforward.errors import StorageError
from rollforward.storage import Storage, read_small

LARGE = 33 << 20
"""More than two parts of an upload, and than several ranges of a read."""


def all_bytes(storage: Storage, path: str) -> bytes:
    return read_small(storage, path, limit=1 << 30)


class StorageCase:
    """Subclasses name the place; the fixture `storage` gives an empty folder of it."""

    def test_a_written_file_reads_back_whole(self, storage):
        assert storage.write("a/b/c.bin", [b"one", bytearray(b"two"), memoryview(b"three"), b""]) == 11
        assert read_small(storage, "a/b/c.bin", limit=11) == b"onetwothree"

    def test_writing_again_replaces_the_file_as_a_whole(self, storage):
        storage.write("f", [b"a longer first text"])
        storage.write("f", [b"short"])
        assert read_small(storage, "f", limit=100) == b"short"

    def test_nothing_but_the_file_is_left_behind(self, storage):
        storage.write("folder/f", [b"1"])
        assert [entry.name for entry in storage.scan("folder")] == ["f"]

    def test_content_that_raises_leaves_the_old_file_and_no_temporary(self, storage):
        def broken():
            yield b"half"
            raise RuntimeError("the engine went away")

        storage.write("folder/f", [b"old"])
        with pytest.raises(RuntimeError):
            storage.write("folder/f", broken())
        assert read_small(storage, "folder/f", limit=3) == b"old"
        assert [entry.name for entry in storage.scan("folder")] == ["f"]

    def test_reading_at_an_offset_fills_just_the_buffer(self, storage):
        storage.write("f", [bytes(range(200))])
        buffer = bytearray(7)
        with storage.open("f") as handle:
            assert handle.size == 200
            handle.read_into(memoryview(buffer), 50)
        assert buffer == bytes(range(50, 57))

    def test_reading_past_the_end_is_an_error(self, storage):
        storage.write("f", [b"12345"])
        with storage.open("f") as handle, pytest.raises(StorageError, match="ends at byte 5"):
            handle.read_into(memoryview(bytearray(3)), 3)

    def test_opening_what_is_not_there_says_so_with_a_hint(self, storage):
        with pytest.raises(StorageError, match=r"opening .*missing: [Nn]o such (file|object)") as caught:
            storage.open("missing")
        assert caught.value.hint

    def test_stat_and_scan_tell_files_from_folders(self, storage):
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

    def test_removing_twice_is_no_error(self, storage):
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
    def test_a_path_that_leads_out_is_refused_by_every_call(self, storage, path):
        for call in (storage.open, storage.stat, storage.remove, lambda name: storage.write(name, [b""])):
            with pytest.raises(StorageError, match="refusing a path"):
                call(path)

    def test_a_larger_file_than_expected_is_not_read(self, storage):
        storage.write("f", [b"123456"])
        with pytest.raises(StorageError, match="6 bytes, where at most 5"):
            read_small(storage, "f", limit=5)

    def test_a_buffer_that_is_used_again_for_the_next_piece_keeps_every_piece(self, storage):
        piece = bytearray(4 << 20)
        pieces = LARGE // len(piece) + 1

        def reused():
            for number in range(pieces):
                piece[:] = bytes([number]) * len(piece)
                yield memoryview(piece)

        assert storage.write("large", reused()) == pieces * len(piece)
        with storage.open("large") as handle:
            read = bytearray(handle.size)
            handle.read_into(memoryview(read), 0)
        assert [set(read[at : at + len(piece)]) for at in range(0, len(read), len(piece))] == [
            {number} for number in range(pieces)
        ]

    def test_any_range_of_a_large_file_is_read_into_its_place(self, storage):
        content = random.Random(1).randbytes(LARGE)
        storage.write("large", [content])
        into = bytearray(LARGE - 1000)
        with storage.open("large") as handle:
            handle.read_into(memoryview(into), 777)
        assert into == content[777 : LARGE - 223]

    def test_large_content_that_raises_leaves_the_old_file(self, storage):
        def broken():
            yield bytes(LARGE)
            raise RuntimeError("the engine went away")

        storage.write("folder/f", [b"old"])
        with pytest.raises(RuntimeError, match="went away"):
            storage.write("folder/f", broken())
        assert all_bytes(storage, "folder/f") == b"old"
        assert [entry.name for entry in storage.scan("folder")] == ["f"]

    def test_names_with_signs_of_all_kinds_are_kept(self, storage):
        for name in ("a b", "100%41", "model.layers.0+x", "数据", "~", "a=b&c?d#e", ".hidden"):
            storage.write(f"names/{name}", [name.encode()])
            assert all_bytes(storage, f"names/{name}") == name.encode()
        assert len(storage.scan("names")) == 7

    def test_a_file_that_grows_is_one_file_to_everybody(self, storage):
        appender = storage.appender("journal/rank_0/1-0_0.journal")
        for piece in ([b"one", b"two"], [b"three"], [b"x" * 70_000]):
            appender.append(piece)
        assert appender.size == 11 + 70_000
        assert all_bytes(storage, "journal/rank_0/1-0_0.journal") == b"onetwothree" + b"x" * 70_000
        assert [(each.name, each.kind, each.size) for each in storage.scan("journal/rank_0")] == [
            ("1-0_0.journal", "file", 70_011)
        ]
        assert storage.stat("journal/rank_0/1-0_0.journal").size == 70_011
        with storage.open("journal/rank_0/1-0_0.journal") as handle:
            across = bytearray(9)
            handle.read_into(memoryview(across), 4)
        assert across == b"wothreexx"
        appender.close()
        with pytest.raises(StorageError):
            appender.append([b"late"])

    def test_what_was_written_is_durable_with_the_next_sync(self, storage):
        appender = storage.appender("journal/a")
        appender.write([b"outcome, "])
        appender.write([bytearray(b"rollouts"), memoryview(b", more")])
        assert appender.size == 0
        appender.sync()
        assert appender.size == 23
        assert all_bytes(storage, "journal/a") == b"outcome, rollouts, more"
        storage.sync_file("journal/a")
        with pytest.raises(StorageError, match="missing"):
            storage.sync_file("journal/missing")

    def test_a_name_that_is_taken_does_not_grow(self, storage):
        storage.write("f", [b"older"])
        storage.appender("g").append([b"older"])
        for name in ("f", "g"):
            with pytest.raises(StorageError, match="creating"):
                storage.appender(name)

    def test_a_rewritten_file_goes_on_growing_with_its_new_content(self, storage):
        first = storage.appender("metrics.jsonl")
        first.append([b"1\n"])
        first.append([b"2\n"])
        first.append([b"3\n"])
        second = storage.rewrite("metrics.jsonl", [b"1\n", b"2\n"])
        assert second.size == 4
        assert all_bytes(storage, "metrics.jsonl") == b"1\n2\n"
        second.append([b"other\n"])
        assert all_bytes(storage, "metrics.jsonl") == b"1\n2\nother\n"
        assert [entry.name for entry in storage.scan("")] == ["metrics.jsonl"]
        storage.write("plain", [b"1\n2\n"])
        storage.rewrite("plain", [b"1\n"]).append([b"3\n"])
        assert all_bytes(storage, "plain") == b"1\n3\n"

    def test_a_file_that_was_rewritten_to_nothing_grows_again(self, storage):
        storage.appender("metrics.jsonl").append([b"1\n", b"2\n"])
        emptied = storage.rewrite("metrics.jsonl", [])
        assert all_bytes(storage, "metrics.jsonl") == b""
        emptied.append([b"3\n"])
        emptied.append([b"4\n"])
        assert all_bytes(storage, "metrics.jsonl") == b"3\n4\n"
        storage.rewrite("metrics.jsonl", [b"3\n"]).append([b"5\n"])
        assert all_bytes(storage, "metrics.jsonl") == b"3\n5\n"

    def test_more_rewrites_than_four_digits_hold_lose_nothing(self, storage):
        storage.appender("f").append([b"1"])
        if hasattr(storage, "create"):
            storage.create("f+9999-0000000000000000", b"2")
        storage.rewrite("f", [b"3"]).append([b"4"])
        assert all_bytes(storage, "f") == b"34"

    def test_who_appends_to_a_file_that_was_rewritten_does_not_reach_the_new_one(self, storage):
        zombie = storage.appender("metrics.jsonl")
        zombie.append([b"1\n"])
        successor = storage.rewrite("metrics.jsonl", [b"1\n"])
        with suppress(StorageError):  # a service may refuse it; a file system keeps the replaced file for it
            zombie.append([b"zombie\n"])
        successor.append([b"2\n"])
        assert all_bytes(storage, "metrics.jsonl") == b"1\n2\n"

    def test_a_file_that_grew_is_removed_as_a_whole(self, storage):
        appender = storage.appender("journal/a")
        appender.append([b"1"])
        appender.append([b"2"])
        storage.write("journal/a.torn", [b"kept"])
        storage.remove("journal/a")
        assert storage.stat("journal/a") is None
        assert [entry.name for entry in storage.scan("journal")] == ["a.torn"]
