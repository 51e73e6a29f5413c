"""Protocol buffers, walked in place: the fields of a message and where their contents are.

For the two MindSpore formats that a run may have to read, `.ckpt` and strategy files, so that they can
be inspected before a framework is loaded, however large their contents are. The input is not trusted:
every length is checked against the enclosing message, and the number of fields and numbers in a file is
bounded, since walking them takes time.

The encoding: https://protobuf.dev/programming-guides/encoding. Not supported: writing, and fixed-width
numbers and groups, which those files do not have.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rollforward.storage import ReadHandle

_PAGE = 4096
_MAX_TEXT = 1 << 16
_MOST_STEPS = 2_000_000
"""Most fields and numbers in a file: room for 100,000 tensors, walked in seconds."""
_VARINT, _LENGTH = 0, 2


@dataclass(frozen=True)
class Field:
    """One field of a message."""

    number: int
    value: int | None
    """The integer; None when the content is bytes, text or a message."""
    begin: int
    """Where the content starts in the file."""
    end: int


class Wire:
    """An open file that holds messages."""

    def __init__(self, handle: ReadHandle) -> None:
        self._handle = handle
        self._page = b""
        self._page_begin = 0
        self.size = handle.size
        self._steps = 0

    def fields(self, begin: int, end: int) -> Iterator[Field]:
        """The fields of the message that fills a range of the file. ValueError when it is not a message."""
        while begin < end:
            key, begin = self._varint(begin, end)
            number, kind = key >> 3, key & 7
            if number == 0:
                raise ValueError(f"no message at byte {begin}")
            if kind == _VARINT:
                value, after = self._varint(begin, end)
                yield Field(number, value, begin, after)
            elif kind == _LENGTH:
                length, begin = self._varint(begin, end)
                after = begin + length
                if after > end:
                    raise ValueError(f"{length} bytes are said to follow byte {begin}, and {end - begin} do")
                yield Field(number, None, begin, after)
            else:
                raise ValueError(f"no message at byte {begin}")
            begin = after

    def integers(self, field: Field, most: int) -> list[int]:
        """The values of a repeated integer field, packed or not; ValueError when more than `most`."""
        if field.value is not None:
            return [field.value]
        found, begin = [], field.begin
        while begin < field.end:
            value, begin = self._varint(begin, field.end)
            found.append(value)
            if len(found) > most:
                raise ValueError(f"more than {most} numbers at byte {field.begin}")
        return found

    def text(self, field: Field) -> str:
        """A field's content as text; ValueError when it is not text, or is very long."""
        if field.end - field.begin > _MAX_TEXT:
            raise ValueError(f"a text of {field.end - field.begin} bytes at byte {field.begin}")
        return self.content(field.begin, field.end).decode()

    def content(self, begin: int, end: int) -> bytes:
        """The bytes of a range; StorageError when the file has shrunk."""
        page_end = self._page_begin + len(self._page)
        if not self._page_begin <= begin <= end <= page_end:
            size = max(end - begin, min(_PAGE, self.size - begin))
            buffer = bytearray(size)
            self._handle.read_into(memoryview(buffer), begin)
            self._page, self._page_begin = bytes(buffer), begin
        return self._page[begin - self._page_begin : end - self._page_begin]

    def _varint(self, begin: int, end: int) -> tuple[int, int]:
        """A number, seven bits a byte, least significant first; and where the next field begins."""
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS} fields and numbers")
        content = self.content(begin, min(begin + 10, end))
        value = 0
        for index, byte in enumerate(content):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value, begin + index + 1
        raise ValueError(f"no number at byte {begin}")
