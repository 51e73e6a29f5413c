"""Standard output and standard error that may go away: failing to show something never stops the program.

The reader of a pipe leaves (`| head`, a `tee` that was killed), the disk behind `> log` fills up, a
terminal's encoding lacks a character, the shell has closed a descriptor. Writing here continues anyway.
Characters that the stream's encoding lacks are escaped. After any other failure nothing more is shown: from
then on the descriptor points to /dev/null, so that Python's own flush at exit does not fail either, and the
failure is kept in `lost` so that it can be reported.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


def guard_descriptors() -> None:
    """Open descriptors 0, 1 and 2 in a process that was started without them. Call this first.

    Otherwise the next file opened would get that number, and printed output would go into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            found = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if found != number:
                os.dup2(found, number)
                os.close(found)


class _Nowhere(io.TextIOBase):
    """A stream that discards everything."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Discard it."""
        return len(text)

    def writable(self) -> bool:
        """Always."""
        return True


class Forgiving(io.TextIOBase):
    """A stream whose writes succeed; everything else is the stream's own."""

    def __init__(self, stream: TextIO | None, told: Callable[[OSError | ValueError], None]) -> None:
        """`told` is called once, with the error that made the stream useless."""
        self._stream: TextIO | _Nowhere = stream if stream is not None else _Nowhere()
        self._told = told
        self._fileno = -1
        with suppress(OSError, ValueError, AttributeError):
            self._fileno = self._stream.fileno()
        self.lost: OSError | ValueError | None = None
        """Why nothing is shown any more; None while everything is."""

    def write(self, text: str) -> int:
        """Write what can be written."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written, while the stream still works."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: OSError | ValueError) -> None:
        if self.lost is not None:
            return
        self.lost = error
        if self._fileno >= 0:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            # Child processes inherit it, as they would have inherited the stream.
            os.dup2(nowhere, self._fileno)
            os.close(nowhere)
        self._stream = _Nowhere()
        self._told(error)

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.lost is None and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's own."""
        if self._fileno < 0:
            raise io.UnsupportedOperation("fileno")
        # A lost stream's descriptor is still open, and leads nowhere.
        return self._fileno

    def writable(self) -> bool:
        """Always."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's own."""
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """The stream's own."""
        return self._stream.errors

    @property
    def buffer(self) -> Any:
        """The stream's own; errors of direct writes to it are not caught."""
        return io.BytesIO() if isinstance(self._stream, _Nowhere) else self._stream.buffer


class Forgiven:
    """Within it `sys.stdout` and `sys.stderr` are `Forgiving`; afterwards they are what they were."""

    def __init__(self) -> None:
        self.output = Forgiving(sys.stdout, self._output_lost)
        self.errors = Forgiving(sys.stderr, lambda _: None)
        self._tell: Callable[[str], None] | None = None

    def __enter__(self) -> "Forgiven":
        global _current
        self._before = sys.stdout, sys.stderr, _current
        sys.stdout, sys.stderr = self.output, self.errors
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        self.output.flush()
        self.errors.flush()
        output, errors, _current = self._before
        if self.output.lost is None:
            sys.stdout = output
        if self.errors.lost is None:
            sys.stderr = errors

    def tell_loss(self, tell: Callable[[str], None] | None) -> None:
        """Call `tell` with a message when standard output is lost, or right away if it already is."""
        self._tell = tell
        if self.output.lost is not None:
            self._output_lost(self.output.lost)

    def _output_lost(self, error: OSError | ValueError) -> None:
        if self._tell is not None:
            text = f"warning: standard output is lost ({reason(error)}); the log file has everything"
            self._tell(text)
            self.errors.write(f"{text}\n")
            self.errors.flush()


_current: Forgiven | None = None


@contextmanager
def telling_loss(tell: Callable[[str], None]) -> Iterator[None]:
    """Within it, the loss of standard output is reported to `tell` and on standard error."""
    streams = _current
    if streams is not None:
        streams.tell_loss(tell)
    try:
        yield
    finally:
        if streams is not None:
            streams.tell_loss(None)


def reason(error: OSError | ValueError) -> str:
    """What made a stream useless, in words."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
