"""Reading a file from its beginning to its end, in small pieces, where each request takes its time.

`in_order` is for whoever reads records one after another. What is asked for comes with what follows it:
first a little, then more each time, as long as the file is read in order. So few requests are made, whoever
looks at the beginning alone is not sent all of it, and one window is all that is held.

Left out: files on a disk, which are read as they are; and reading ahead on a thread.
"""

from types import TracebackType

from rollforward.storage.base import ReadHandle

WINDOW_BYTES = 8 << 20
"""At most so much is held."""
_FIRST_BYTES = 64 << 10
_GAP = 4
"""So many times as much may be skipped, and comes along: it is read next, or a little later."""


def in_order(handle: ReadHandle) -> ReadHandle:
    """The open file, to be read mostly in order; itself where a request costs little."""
    return _InOrder(handle) if handle.chunk_bytes >= WINDOW_BYTES else handle


class _InOrder:
    """`ReadHandle`. Not for several threads at a time."""

    def __init__(self, handle: ReadHandle) -> None:
        self.size = handle.size
        self.chunk_bytes = handle.chunk_bytes
        self._handle = handle
        self._begin = 0
        """Where in the file the window begins."""
        self._window = bytearray()
        self._ahead = _FIRST_BYTES

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """See `ReadHandle.read_into`. What the window has is not asked for again."""
        target = buffer.cast("B")
        end = offset + len(target)
        if end > self.size:
            self._handle.read_into(target, offset)  # which says that the file ends before that
        if not self._begin <= offset <= self._end + min(_GAP * self._ahead, WINDOW_BYTES // 4):
            self._begin, self._window, self._ahead = offset, bytearray(), _FIRST_BYTES
        if len(target) > WINDOW_BYTES // 4:
            self._past(target, offset)
            return
        if end > self._end:
            self._forget(offset)
            self._extend(end)
        begin = offset - self._begin
        target[:] = memoryview(self._window)[begin : begin + len(target)]

    @property
    def _end(self) -> int:
        """Where in the file the window ends."""
        return self._begin + len(self._window)

    def _past(self, target: memoryview, offset: int) -> None:
        """Read what is long straight into place, but for what is there, and begin a new window behind it."""
        found = memoryview(self._window)[offset - self._begin :][: len(target)]
        target[: len(found)] = found
        self._begin, self._window = offset + len(target), bytearray()
        self._handle.read_into(target[len(found) :], offset + len(found))

    def _extend(self, end: int) -> None:
        """Have the window reach to `end`, and some way further: each time a longer one."""
        more = bytearray(min(max(end, self._end + self._ahead), self.size) - self._end)
        self._handle.read_into(memoryview(more), self._end)
        if self._window:
            self._ahead = min(2 * self._ahead, WINDOW_BYTES // 4)
        self._window += more

    def _forget(self, offset: int) -> None:
        """Let go of what lies far before `offset`: who reads in order may look back a little."""
        far = min(offset - self._begin - WINDOW_BYTES // 4, len(self._window))
        if far > 0:
            del self._window[:far]
            self._begin += far

    def close(self) -> None:
        """Close the file."""
        self._window = bytearray()
        self._handle.close()

    def __enter__(self) -> "_InOrder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
