"""Denormal numbers count as zero while MindSpore computes, on every thread.

MindSpore 2.10's own threads treat them so (FTZ and DAZ of x86-64), the main thread does not. A graph runs on
those threads at first, and later on whichever was faster in its first runs. So without this, the clock would
decide about bits: the same update of the same tensors, with denormals among them, gives one of two results.

Some of its threads are started by the first graph that runs, and a thread begins in the state of the one that
starts it. So no graph may run outside, not even one that only exchanges numbers.

The state belongs to a thread, and is put back: verifiers and everything else compute as Python does.
Elsewhere than on x86-64 with glibc nothing is done, since it was not tried there.
"""

import ctypes
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_BYTES = 32
"""Of `fenv_t` (glibc, sysdeps/x86/fpu/bits/fenv.h)."""
_MXCSR = 28
"""Where the control and status register of SSE is in it."""
_FLUSH = 0x8040
"""FTZ: results are flushed to zero; DAZ: operands count as zero."""


@contextmanager
def flushed() -> Iterator[None]:
    """Within it, this thread treats denormals as MindSpore's threads do."""
    library = _library()
    if library is None:
        yield
        return
    before = ctypes.create_string_buffer(_BYTES)
    library.fegetenv(before)
    during = bytearray(before.raw)
    struct.pack_into("<I", during, _MXCSR, struct.unpack_from("<I", during, _MXCSR)[0] | _FLUSH)
    library.fesetenv(bytes(during))
    try:
        yield
    finally:
        library.fesetenv(before)


@cache
def _library() -> ctypes.CDLL | None:
    if platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libm.so.6")
