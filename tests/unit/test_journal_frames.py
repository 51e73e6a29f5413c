"""Frames give back what was put in, and no damage to a segment passes for a frame."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollforward.errors import StorageError
from rollforward.store.journal.frames import (
    FRONT_BYTES,
    MAGIC,
    NO_SALT,
    BadFrame,
    Ending,
    Frame,
    encode_frame,
    examine,
    read_frame,
    read_frames,
)


@dataclass
class InMemory:
    """A file that counts what is read of it."""

    content: bytes
    asked: int = 0
    chunk_bytes: int = 1 << 20

    @property
    def size(self) -> int:
        return len(self.content)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.asked += len(buffer)
        if offset + len(buffer) > len(self.content):
            raise StorageError("the file ends")
        buffer[:] = self.content[offset : offset + len(buffer)]

    def close(self) -> None:
        pass

    def __enter__(self) -> "InMemory":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def segment(payloads: list[bytes], first_sequence: int = 0) -> bytes:
    """The file of a journal that makes each frame durable before the next."""
    return b"".join(frames_of([(payload, True) for payload in payloads], first_sequence))


def frames_of(written: list[tuple[bytes, bool]], first_sequence: int = 0) -> list[bytes]:
    """The frames of a journal; of each the payload, and whether a sync follows it."""
    frames: list[bytes] = []
    unsynced = 0
    for number, (payload, synced) in enumerate(written):
        salt = frames[0][FRONT_BYTES - 16 : FRONT_BYTES] if frames else NO_SALT
        frames.append(encode_frame(first_sequence + number, unsynced, payload, salt))
        unsynced = 0 if synced else unsynced + 1
    return frames


def read(content: bytes) -> tuple[list[Frame], Ending]:
    handle = InMemory(content)
    frames = list(read_frames(handle))
    salt = frames[0].digest if frames else NO_SALT
    return frames, examine(handle, frames[-1] if frames else None, salt)


PAYLOADS = st.lists(st.binary(max_size=60), min_size=1, max_size=5)
THREE = [b"first", b"the second, longer than the others", b"third"]


@given(PAYLOADS, st.integers(0, 2**32 - 6))
def test_frames_come_back_as_they_were_written(payloads: list[bytes], first: int) -> None:
    frames, ending = read(segment(payloads, first))
    assert [frame.payload for frame in frames] == payloads
    assert [frame.sequence for frame in frames] == list(range(first, first + len(payloads)))
    assert ending == Ending(frames[-1].end)


@given(PAYLOADS, st.data())
@settings(max_examples=300)
def test_a_segment_cut_anywhere_keeps_whole_frames_and_is_torn(
    payloads: list[bytes], data: st.DataObject
) -> None:
    content = segment(payloads)
    cut = data.draw(st.integers(0, len(content) - 1))
    frames, ending = read(content[:cut])
    assert [frame.payload for frame in frames] == payloads[: len(frames)]
    assert len(frames) < len(payloads)
    assert ending.offset == (frames[-1].end if frames else 0)
    assert not ending.damaged
    assert bool(ending.problem) == (cut != ending.offset or not frames)


def test_every_flipped_bit_is_found_and_told_from_a_torn_end() -> None:
    content = segment(THREE)
    ends = [frame.end for frame in read(content)[0]]
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        frames, ending = read(bytes(damaged))
        hit = next(number for number, end in enumerate(ends) if bit // 8 < end)
        assert [frame.payload for frame in frames] == THREE[:hit], f"bit {bit}"
        assert ending.problem
        assert ending.damaged == (hit < 2), f"bit {bit} of frame {hit}"


SYNCED_OR_NOT = st.lists(st.tuples(st.binary(max_size=60), st.booleans()), min_size=1, max_size=7)


@given(SYNCED_OR_NOT, st.data())
@settings(max_examples=300)
def test_whatever_a_crash_leaves_of_what_was_not_synced_is_torn(
    written: list[tuple[bytes, bool]], data: st.DataObject
) -> None:
    """Each unsynced frame may be whole, zeros, or missing from the end on, independently of the others."""
    written[0] = (written[0][0], True)
    frames = frames_of(written)
    durable = max(number for number, (_, synced) in enumerate(written) if synced) + 1
    left = [
        frame if number < durable or data.draw(st.booleans()) else bytes(len(frame))
        for number, frame in enumerate(frames)
    ]
    content = b"".join(left)
    content = content[: data.draw(st.integers(len(b"".join(left[:durable])), len(content)))]
    found, ending = read(content)
    assert [frame.payload for frame in found][:durable] == [payload for payload, _ in written[:durable]]
    assert not ending.damaged


@given(SYNCED_OR_NOT, st.data())
@settings(max_examples=300)
def test_what_was_durable_when_a_later_frame_was_written_is_damaged_and_not_torn(
    written: list[tuple[bytes, bool]], data: st.DataObject
) -> None:
    written[0] = (written[0][0], True)
    frames = frames_of([*written, (b"a later one", True)])
    before = max(number for number, (_, synced) in enumerate(written) if synced) + 1
    hit = data.draw(st.integers(0, before - 1))
    bit = data.draw(st.integers(0, 8 * len(frames[hit]) - 1))
    damaged = bytearray(frames[hit])
    damaged[bit // 8] ^= 1 << bit % 8
    found, ending = read(b"".join([*frames[:hit], bytes(damaged), *frames[hit + 1 :]]))
    assert len(found) == hit
    assert ending.damaged


def test_more_than_a_crash_can_spoil_is_damage_and_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollforward.store.journal.frames.MAX_FRAME_BYTES", 1000)
    monkeypatch.setattr("rollforward.store.journal.frames.MAX_UNSYNCED_BYTES", 500)
    most = bytes(1500 + FRONT_BYTES)
    assert not read(segment([b"first"]) + most)[1].damaged
    assert read(segment([b"first"]) + most + b"\0")[1].damaged


def test_a_zeroed_tail_is_torn_and_a_zeroed_page_in_the_middle_is_damage() -> None:
    content = segment(THREE)
    ends = [frame.end for frame in read(content)[0]]
    assert not read(content[: ends[1]] + bytes(512))[1].damaged
    middle = content[: ends[0]] + bytes(ends[1] - ends[0]) + content[ends[1] :]
    frames, ending = read(middle)
    assert len(frames) == 1
    assert ending.damaged


def test_a_frame_of_another_segment_does_not_pass() -> None:
    own, other = segment([b"mine", b"a", b"b"]), segment([b"other", b"a", b"b"])
    end = read(own)[0][0].end
    other_end = read(other)[0][0].end
    frames, ending = read(own[:end] + other[other_end:])
    assert len(frames) == 1
    assert ending.problem == "a frame that does not have its digest"


def test_a_frame_out_of_sequence_is_damage() -> None:
    content = segment(THREE)
    frames, _ = read(content)
    left_out = content[: frames[0].end] + content[frames[1].end :]
    found, ending = read(left_out)
    assert len(found) == 1
    assert ending == Ending(frames[0].end, "frame 2 stands where 1 was due", damaged=True)


def test_the_same_frame_twice_is_damage() -> None:
    content = segment(THREE)
    last = read(content)[0][-1]
    found, ending = read(content + content[last.offset :])
    assert len(found) == 3
    assert ending.damaged


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 1000])
def test_no_length_is_believed_beyond_the_end_of_the_file(length: int) -> None:
    content = MAGIC + length.to_bytes(8, "little") + bytes(8) + bytes(16) + b"x" * 100
    handle = InMemory(content)
    with pytest.raises(BadFrame, match="where the file has 100 more"):
        read_frame(handle, 0, NO_SALT)
    assert handle.asked == FRONT_BYTES


def test_searching_for_frames_behind_damage_reads_the_file_about_once() -> None:
    """A region full of things that begin like frames must not make the search quadratic."""
    front = encode_frame(0, 0, b"first", NO_SALT)
    fake = MAGIC + (10_000).to_bytes(8, "little") + (2**30).to_bytes(8, "little") + bytes(16)
    handle = InMemory(front + b"?" + fake * 5_000)
    first = next(read_frames(handle))
    handle.asked = 0
    assert not examine(handle, first, first.digest).damaged
    assert handle.asked < 3 * handle.size


def test_a_frame_is_found_behind_damage_wherever_a_piece_of_the_search_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rollforward.store.journal.frames._SEARCH_BYTES", 16)
    content = bytearray(segment(THREE))
    first = read(bytes(content))[0][0]
    for padding in range(40):
        damaged = segment(THREE)
        content = damaged[: first.end] + b"?" * padding + damaged[read(damaged)[0][2].offset :]
        assert read(bytes(content))[1].damaged, f"{padding} bytes before the frame"
