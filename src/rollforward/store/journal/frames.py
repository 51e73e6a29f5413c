"""Frames: how records are stored in a journal segment, and how to tell damage from a torn write.

    magic 8 | payload length u64 | sequence number u32 | unsynced u32 | digest 16 | payload    (little-endian)

The digest is XXH3-128 over salt, payload length, sequence number, unsynced and payload. The salt is 16
zero bytes for the first frame of a segment and the first frame's digest for all others. So a frame
proves that it belongs to exactly this segment: one copied from elsewhere, or one that the file
system brings back from a deleted file, does not pass.

A crash can only spoil frames that were not durable, and may keep a later one of these while it spoils an
earlier one. So each frame says how many before it were *unsynced* when it was written: all before those were
durable by then. A frame that is not intact is *torn* when every intact frame behind it counts it among its
unsynced ones, or there is none; otherwise it is *damage*.

No length is trusted before it was compared with the file's size and with the maximum frame size; and a long
frame is loaded into memory only once its digest has been verified, since a sparse file can claim any size.
Bytes that are longer than all that may be unsynced cannot come from a crash: they are damage, and are not
searched.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash

from rollforward.storage import ReadHandle

MAGIC = b"\x93RFWDJ1\n"
"""Not text, not UTF-8, and broken by anything that changes line endings; the digit is the format version."""

_FRONT = struct.Struct("<8sQII16s")
_DIGESTED = struct.Struct("<QII")
FRONT_BYTES = _FRONT.size
NO_SALT = bytes(16)
MAX_FRAME_BYTES = 1 << 29
"""For a payload. The largest chunk of rollouts that fits a trainer is a fraction of this."""
MAX_UNSYNCED_BYTES = 1 << 20
"""For the frames that are not durable when another is written."""
_SEARCH_BYTES = 1 << 20
_LONG_BYTES = 32 << 20
"""A payload longer than this is digested before it is loaded."""


@dataclass(frozen=True)
class Frame:
    """An intact frame."""

    offset: int
    """Of its first byte, in the segment."""
    sequence: int
    unsynced: int
    """How many frames before it were not known to be durable when it was written."""
    payload: bytes
    digest: bytes

    @property
    def end(self) -> int:
        """Offset of the byte after it."""
        return self.offset + FRONT_BYTES + len(self.payload)


@dataclass(frozen=True)
class Ending:
    """How a segment ends, after its last intact frame."""

    offset: int
    """Where the intact frames end."""
    problem: str = ""
    """What is there, in one line; empty when the file ends there too."""
    damaged: bool = False
    """True when no crash explains it: a frame that follows proves it, or the file cannot be read."""


class BadFrame(ValueError):
    """Bytes that are not an intact frame. The reason fits one line."""


def encode_frame(sequence: int, unsynced: int, payload: bytes, salt: bytes) -> bytes:
    """A frame around a payload; ValueError when it is too long to be read back."""
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"a record of {len(payload)} bytes; {MAX_FRAME_BYTES} are the most")
    digest = _digest((len(payload), sequence, unsynced), payload, salt)
    return _FRONT.pack(MAGIC, len(payload), sequence, unsynced, digest) + payload


def read_frame(handle: ReadHandle, offset: int, salt: bytes) -> Frame:
    """The frame that starts at `offset`; BadFrame when there is no intact one.

    StorageError when the file cannot be read.
    """
    left = handle.size - offset
    if left < FRONT_BYTES:
        raise BadFrame(f"{left} bytes, too few for a frame")
    front = bytearray(FRONT_BYTES)
    handle.read_into(memoryview(front), offset)
    magic, *numbers, digest = _FRONT.unpack(front)
    length, sequence, unsynced = numbers
    if magic != MAGIC:
        raise BadFrame("no frame begins here")
    if length > left - FRONT_BYTES:
        raise BadFrame(f"a frame of {length} bytes where the file has {left - FRONT_BYTES} more")
    if length > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {length} bytes, longer than any")
    if length > _LONG_BYTES and _digest_of_file(handle, offset, numbers, salt) != digest:
        raise BadFrame("a frame that does not have its digest")
    payload = bytearray(length)
    if length:
        handle.read_into(memoryview(payload), offset + FRONT_BYTES)
    content = bytes(payload)
    if _digest(numbers, content, salt) != digest:
        raise BadFrame("a frame that does not have its digest")
    return Frame(offset, sequence, unsynced, content, digest)


def read_frames(handle: ReadHandle) -> Iterator[Frame]:
    """The intact frames of a segment, in order, up to the first bad one. Sequence numbers have no gap.

    StorageError when the file cannot be read.
    """
    offset, salt, sequence = 0, NO_SALT, None
    while offset < handle.size:
        try:
            frame = read_frame(handle, offset, salt)
        except BadFrame:
            return
        if sequence is not None and frame.sequence != sequence + 1:
            return
        yield frame
        salt = frame.digest if sequence is None else salt
        offset, sequence = frame.end, frame.sequence


def examine(handle: ReadHandle, last: Frame | None, salt: bytes) -> Ending:
    """What follows the last intact frame; `salt` is the first frame's digest."""
    offset = last.end if last is not None else 0
    if offset == handle.size:
        # An empty file is a segment whose first frame was never written.
        return Ending(0, "an empty file") if last is None else Ending(offset)
    try:
        frame = read_frame(handle, offset, salt if last is not None else NO_SALT)
    except BadFrame as error:
        problem = str(error)
    else:
        due = last.sequence + 1 if last is not None else 0
        return Ending(offset, f"frame {frame.sequence} stands where {due} was due", damaged=True)
    if handle.size - offset > MAX_UNSYNCED_BYTES + FRONT_BYTES + MAX_FRAME_BYTES:
        return Ending(
            offset, f"{problem}; {handle.size - offset} bytes, more than a crash can spoil", damaged=True
        )
    if last is None:
        # The first frame is alone in the file until it is durable: anything like a frame after it
        # was written later. Its digest is the salt, so what follows cannot be verified without it.
        return Ending(0, problem, damaged=any(_magics(handle, 1)))
    return Ending(offset, problem, damaged=_was_durable(handle, offset + 1, last, salt))


def _was_durable(handle: ReadHandle, begin: int, last: Frame, salt: bytes) -> bool:
    """Whether an intact frame of this segment, from `begin` on, proves that the one after `last` was durable.

    True too when so much looks like frames that trying it all would take too long: no torn write does that.
    """
    left = max(4 * (handle.size - begin), _LONG_BYTES)
    for offset in _magics(handle, begin):
        if handle.size - offset < FRONT_BYTES:
            return False
        front = bytearray(FRONT_BYTES)
        handle.read_into(memoryview(front), offset)
        _, length, sequence, _, _ = _FRONT.unpack(front)
        # Check before reading the payload: no more frames can follow than there is room for.
        if not last.sequence < sequence <= last.sequence + 1 + (handle.size - last.end) // FRONT_BYTES:
            continue
        left -= length if length <= min(handle.size - offset, MAX_FRAME_BYTES) else 0
        if left < 0:
            return True
        try:
            frame = read_frame(handle, offset, salt)
        except BadFrame:
            continue
        if not frame.sequence - frame.unsynced <= last.sequence + 1 < frame.sequence:
            return True
    return False


def _magics(handle: ReadHandle, begin: int) -> Iterator[int]:
    """Offsets of the magic at `begin` or later. Reads a bounded piece at a time."""
    overlap = len(MAGIC) - 1
    while begin < handle.size:
        piece = bytearray(min(_SEARCH_BYTES + overlap, handle.size - begin))
        handle.read_into(memoryview(piece), begin)
        at = piece.find(MAGIC)
        while at >= 0:
            yield begin + at
            at = piece.find(MAGIC, at + 1)
        begin += _SEARCH_BYTES


def _digest_of_file(handle: ReadHandle, offset: int, numbers: Sequence[int], salt: bytes) -> bytes:
    """`_digest` of a payload in the file, with one piece in memory at a time."""
    hasher = xxhash.xxh3_128(salt + _DIGESTED.pack(*numbers))
    begin, end = offset + FRONT_BYTES, offset + FRONT_BYTES + numbers[0]
    buffer = bytearray(_SEARCH_BYTES)
    while begin < end:
        piece = memoryview(buffer)[: min(_SEARCH_BYTES, end - begin)]
        handle.read_into(piece, begin)
        hasher.update(piece)
        begin += len(piece)
    return hasher.digest()


def _digest(numbers: Sequence[int], payload: bytes, salt: bytes) -> bytes:
    """`numbers`: payload length, sequence number, unsynced."""
    hasher = xxhash.xxh3_128(salt + _DIGESTED.pack(*numbers))
    hasher.update(payload)
    return hasher.digest()
