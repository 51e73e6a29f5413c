"""Frames: how records lie in a journal segment, and how damage is told from a torn write.

    magic 8 | payload length u64 | sequence number u64 | digest 16 | payload        (little-endian)

The digest is XXH3-128 over salt, payload length, sequence number and payload. The salt is 16
zero bytes for the first frame of a segment and the first frame's digest for all others: a frame
proves that it belongs to just this segment, so neither one copied from elsewhere nor one that
the file system brings back from a deleted file passes.

Each frame is durable before the next is written, so a crash can spoil the last one only. A
frame that does not prove intact is *torn* when nothing intact lies behind it, and *damage* when
something does. No length is believed before it was compared with the file's size and with the most that a
frame may have; and a long frame takes memory only once its digest has proved right, since a sparse file has
whatever size it likes. What is longer than any frame cannot be what one write left: it is damage, and is
not searched.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from rollforward.storage import ReadHandle

MAGIC = b"\x93RFWDJ1\n"
"""Not text, not UTF-8, and broken by whatever changes line ends; the digit is the format's version."""

_FRONT = struct.Struct("<8sQQ16s")
FRONT_BYTES = _FRONT.size
NO_SALT = bytes(16)
MAX_FRAME_BYTES = 1 << 29
"""Of a payload. The largest chunk of rollouts that fits a trainer has a fraction of it."""
_SEARCH_BYTES = 1 << 20
_LONG_BYTES = 32 << 20
"""A payload that is longer is digested before it is read."""


@dataclass(frozen=True)
class Frame:
    """A frame that proved intact."""

    offset: int
    """Of its first byte in the segment."""
    sequence: int
    payload: bytes
    digest: bytes

    @property
    def end(self) -> int:
        """Of the byte after it."""
        return self.offset + FRONT_BYTES + len(self.payload)


@dataclass(frozen=True)
class Ending:
    """How a segment ends, behind its last intact frame."""

    offset: int
    """Where the intact frames end."""
    problem: str = ""
    """What lies there, in one line; empty when the file ends there too."""
    damaged: bool = False
    """True when it cannot be a torn write: intact frames follow, or the file cannot be read."""


class BadFrame(ValueError):
    """Bytes that are not an intact frame. The reason fits one line."""


def encode_frame(sequence: int, payload: bytes, salt: bytes) -> bytes:
    """A frame around a payload; ValueError when it is too long to be read again."""
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"a record of {len(payload)} bytes; {MAX_FRAME_BYTES} are the most")
    digest = _digest(sequence, payload, salt)
    return _FRONT.pack(MAGIC, len(payload), sequence, digest) + payload


def read_frame(handle: ReadHandle, offset: int, salt: bytes) -> Frame:
    """The frame that begins at `offset`; BadFrame when there is no intact one.

    StorageError when the file cannot be read.
    """
    left = handle.size - offset
    if left < FRONT_BYTES:
        raise BadFrame(f"{left} bytes, too few for a frame")
    front = bytearray(FRONT_BYTES)
    handle.read_into(memoryview(front), offset)
    magic, length, sequence, digest = _FRONT.unpack(front)
    if magic != MAGIC:
        raise BadFrame("no frame begins here")
    if length > left - FRONT_BYTES:
        raise BadFrame(f"a frame of {length} bytes where the file has {left - FRONT_BYTES} more")
    if length > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {length} bytes, longer than any")
    if length > _LONG_BYTES and _digest_of_file(handle, offset, length, sequence, salt) != digest:
        raise BadFrame("a frame that does not have its digest")
    payload = bytearray(length)
    if length:
        handle.read_into(memoryview(payload), offset + FRONT_BYTES)
    content = bytes(payload)
    if _digest(sequence, content, salt) != digest:
        raise BadFrame("a frame that does not have its digest")
    return Frame(offset, sequence, content, digest)


def read_frames(handle: ReadHandle) -> Iterator[Frame]:
    """The intact frames of a segment, in order, up to the first that is not. Sequence numbers have no gap.

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
    """What lies behind the last intact frame; `salt` is the first frame's digest."""
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
    if handle.size - offset > FRONT_BYTES + MAX_FRAME_BYTES:
        return Ending(
            offset, f"{problem}; {handle.size - offset} bytes, more than any frame has", damaged=True
        )
    if last is None:
        # The first frame is alone in the file until it is durable: anything like a frame behind it
        # was written later. Its digest is the salt, so what follows cannot be proved without it.
        return Ending(0, problem, damaged=any(_magics(handle, 1)))
    behind = _intact_behind(handle, offset + 1, last, salt)
    return Ending(offset, problem, damaged=behind)


def _intact_behind(handle: ReadHandle, begin: int, last: Frame, salt: bytes) -> bool:
    """Whether any intact frame of this segment begins at `begin` or later.

    True too when so much looks like frames that to try all of it would take too long: no torn write does.
    """
    left = max(4 * (handle.size - begin), _LONG_BYTES)
    for offset in _magics(handle, begin):
        if handle.size - offset < FRONT_BYTES:
            return False
        front = bytearray(FRONT_BYTES)
        handle.read_into(memoryview(front), offset)
        _, length, sequence, _ = _FRONT.unpack(front)
        # Before the payload is read: no more frames can follow than there is room for.
        if not last.sequence < sequence <= last.sequence + 1 + (handle.size - last.end) // FRONT_BYTES:
            continue
        left -= length if length <= min(handle.size - offset, MAX_FRAME_BYTES) else 0
        if left < 0:
            return True
        try:
            read_frame(handle, offset, salt)
        except BadFrame:
            continue
        return True
    return False


def _magics(handle: ReadHandle, begin: int) -> Iterator[int]:
    """Where the magic stands at `begin` or later. Reads a bounded piece at a time."""
    overlap = len(MAGIC) - 1
    while begin < handle.size:
        piece = bytearray(min(_SEARCH_BYTES + overlap, handle.size - begin))
        handle.read_into(memoryview(piece), begin)
        at = piece.find(MAGIC)
        while at >= 0:
            yield begin + at
            at = piece.find(MAGIC, at + 1)
        begin += _SEARCH_BYTES


def _digest_of_file(handle: ReadHandle, offset: int, length: int, sequence: int, salt: bytes) -> bytes:
    """`_digest` of a payload that lies in the file, a piece in memory at a time."""
    hasher = xxhash.xxh3_128(salt + struct.pack("<QQ", length, sequence))
    begin, end = offset + FRONT_BYTES, offset + FRONT_BYTES + length
    buffer = bytearray(_SEARCH_BYTES)
    while begin < end:
        piece = memoryview(buffer)[: min(_SEARCH_BYTES, end - begin)]
        handle.read_into(piece, begin)
        hasher.update(piece)
        begin += len(piece)
    return hasher.digest()


def _digest(sequence: int, payload: bytes, salt: bytes) -> bytes:
    hasher = xxhash.xxh3_128(salt + struct.pack("<QQ", len(payload), sequence))
    hasher.update(payload)
    return hasher.digest()
