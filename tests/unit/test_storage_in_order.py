"""Reading in order: the same bytes as without, in few requests, and no more than a window of them held."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollforward.errors import StorageError
from rollforward.storage.inorder import WINDOW_BYTES, in_order

SIZE = 3 * WINDOW_BYTES
CONTENT = random.Random(1).randbytes(SIZE)
SMALL = 40_000


class Far:
    """A file in a service; each request is noted."""

    def __init__(self, size: int = SIZE, chunk_bytes: int = 4 * WINDOW_BYTES) -> None:
        self.size = size
        self.chunk_bytes = chunk_bytes
        self.asked: list[tuple[int, int]] = []
        self.closed = False

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.asked.append((offset, len(buffer)))
        if offset + len(buffer) > self.size:
            raise StorageError("the file ends")
        buffer[:] = CONTENT[offset : offset + len(buffer)]

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "Far":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sent(self) -> int:
        return sum(size for _, size in self.asked)


def read(handle: object, offset: int, size: int) -> bytes:
    found = bytearray(size)
    handle.read_into(memoryview(found), offset)  # type: ignore[attr-defined]
    return bytes(found)


PLACES = st.one_of(st.integers(0, SIZE), st.sampled_from([0, SMALL, WINDOW_BYTES, SIZE - 1, SIZE]))
LENGTHS = st.one_of(st.integers(0, 2 * SMALL), st.integers(0, 2 * WINDOW_BYTES))
STEPS = st.one_of(st.tuples(st.just("next"), LENGTHS), st.tuples(PLACES, LENGTHS))


@given(st.lists(STEPS, max_size=12))
def test_whatever_is_read_in_whatever_order_has_the_bytes_of_the_file(
    steps: list[tuple[object, int]],
) -> None:
    handle, at = in_order(Far()), 0
    for where, length in steps:
        offset = at if where == "next" else int(str(where))
        size = min(length, SIZE - offset)
        assert read(handle, offset, size) == CONTENT[offset : offset + size]
        assert len(handle._window) <= WINDOW_BYTES  # type: ignore[attr-defined]
        at = offset + size


def test_small_pieces_in_order_are_asked_for_once_and_in_few_requests() -> None:
    far = Far()
    handle = in_order(far)
    for offset in range(0, SIZE, SMALL):
        size = min(SMALL, SIZE - offset)
        assert read(handle, offset, size) == CONTENT[offset : offset + size]
    assert far.sent == SIZE
    assert len(far.asked) < 20 < SIZE // SMALL


def test_pieces_that_are_read_a_little_ahead_and_then_back_are_asked_for_once() -> None:
    """As when a step's outcome is looked at before its rollouts."""
    far = Far()
    handle = in_order(far)
    for offset in range(0, SIZE - 4 * SMALL, 4 * SMALL):
        for piece in (3, 0, 1, 2):
            read(handle, offset + piece * SMALL, SMALL)
    assert far.sent <= SIZE
    assert len(far.asked) < 25


def test_who_looks_at_the_beginning_is_not_sent_all_of_it() -> None:
    far = Far()
    with in_order(far) as handle:
        read(handle, 0, 48)
        read(handle, 48, 1000)
    assert far.sent == 64 << 10
    assert far.closed


def test_long_pieces_are_read_straight_into_place() -> None:
    far = Far()
    handle = in_order(far)
    for offset in (0, WINDOW_BYTES):
        read(handle, offset, 48)
        assert read(handle, offset + 48, WINDOW_BYTES - 48) == CONTENT[offset + 48 : offset + WINDOW_BYTES]
    assert far.sent == 2 * WINDOW_BYTES


def test_what_lies_beyond_the_end_is_the_files_own_error() -> None:
    with pytest.raises(StorageError, match="the file ends"):
        read(in_order(Far(size=100)), 90, 20)


def test_a_file_on_a_disk_is_read_as_it_is() -> None:
    near = Far(chunk_bytes=256 << 10)
    assert in_order(near) is near
