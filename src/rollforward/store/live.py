"""The live tensors to save: a background thread reads and writes them while their owner does other work.

    arrays on the host       read in place, chunk by chunk, until they are about to change: then what has
                             not been read yet is copied
    tensors on a device      copied to the host one by one, when it is their turn to be written; any
                             remaining ones are copied when they are about to change

Either way no byte is copied twice, and only a rank's own share is copied at all. Nothing is read
when a layout or a revision is enough.
"""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rollforward.store.tensorfile import CHUNK_BYTES, as_bytes, dtype_code
from rollforward.tensors import Layout, Tensors, TensorSpec, layout_of


class Live(Protocol):
    """What checkpoints are made of; `grpo.ports.Engine` fits it, although the store does not import it."""

    views: bool
    """Whether `tensors` exposes the live memory itself. If not, each access to a tensor makes a new copy."""

    def layout(self) -> Layout:
        """Which tensors there are, without reading any."""
        ...

    def tensors(self) -> Tensors:
        """The current tensors. Another thread may read them while nothing changes them."""
        ...

    def revision(self, role: str) -> int | None:
        """The same number as before means that the role's bytes have not changed. None: unknown."""
        ...


class HostArrays:
    """`Live` for arrays in host memory that may change at any time, without notice."""

    views = True

    def __init__(self, tensors: Callable[[], Tensors]) -> None:
        self.tensors = tensors

    def layout(self) -> Layout:
        """The arrays' layout; each is a whole tensor."""
        return layout_of(self.tensors())

    def revision(self, role: str) -> int | None:  # noqa: ARG002 - required by the protocol
        """Unknown."""
        return None


def as_live(source: Live | Tensors | Callable[[], Tensors]) -> Live:
    """The source itself; arrays, or a function that returns them, wrapped in `HostArrays`."""
    if isinstance(source, Mapping):
        return HostArrays(lambda: source)
    return HostArrays(source) if callable(source) else source


def revisions_of(live: Live) -> dict[str, int]:
    """role -> revision, for the roles that have one."""
    told = {role: live.revision(role) for role in live.layout()}
    return {role: revision for role, revision in told.items() if revision is not None}


class Guard:
    """A lock between the writer thread and the caller that is waiting to change the tensors.

    A plain lock is not enough: the writer immediately takes it again for the next chunk, and the
    caller might have to wait until the last one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.Event()
        self._free.set()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """For the writer; yields to a waiting caller."""
        self._free.wait()
        with self._lock:
            yield

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """For the caller; waits at most for one chunk, or for one tensor to be copied from its device."""
        self._free.clear()
        try:
            with self._lock:
                yield
        finally:
            self._free.set()


class LiveSource:
    """A live tensor as a `TensorSource`.

    `read` returns the live array itself when `in_place`, otherwise a copy that this source owns.
    """

    def __init__(
        self, spec: TensorSpec, read: Callable[[], NDArray[Any]], guard: Guard, *, in_place: bool
    ) -> None:
        self.dtype = dtype_code(spec.dtype)
        self.shape = spec.shape
        self._read: Callable[[], NDArray[Any]] | None = read
        self._in_place = in_place
        self._guard = guard
        # Look up a live array now: its owner may replace it with another one.
        self._bytes = self._first_read(read) if in_place else None

    def _first_read(self, read: Callable[[], NDArray[Any]]) -> NDArray[np.uint8]:
        array = read()
        found = as_bytes(array)
        # A view in C order is read in place; anything else has to be copied, but only once.
        self._in_place = self._in_place and np.may_share_memory(found, array)
        return found

    def chunks(self) -> Generator[memoryview, None, None]:
        """Yields each chunk under the guard, so that it cannot change while it is being written."""
        begin = 0
        while True:
            with self._guard.reading():
                if self._read is None:
                    raise RuntimeError("a tensor was read after its part had been written")
                if self._bytes is None:
                    self._bytes = self._first_read(self._read)
                data = self._bytes.data
                if begin >= data.nbytes:
                    return
                yield data[begin : begin + CHUNK_BYTES]
            begin += CHUNK_BYTES

    def keep_copy(self) -> int:
        """Read from a copy from now on; returns the bytes copied. The caller must hold the guard."""
        if self._read is None:
            return 0
        if self._bytes is None:
            self._bytes = self._first_read(self._read)
        elif self._in_place:
            self._bytes = np.array(self._bytes, copy=True)
            self._in_place = False
        else:
            return 0
        return self._bytes.nbytes

    def release(self) -> None:
        """Nothing more will be read; drops the copy."""
        with self._guard.reading():
            self._read = self._bytes = None


Share = Mapping[str, Mapping[str, LiveSource]]
"""role -> name -> source, of the tensors that one rank handles."""


def sources_of(live: Live, names: Iterable[tuple[str, str]], guard: Guard) -> Share:
    """The tensors of these (role, name), none of them copied yet."""
    layout, tensors = live.layout(), live.tensors()
    found: dict[str, dict[str, LiveSource]] = {}
    for role, name in names:
        read = partial(_one, tensors, role, name)
        source = LiveSource(layout[role][name], read, guard, in_place=live.views)
        found.setdefault(role, {})[name] = source
    return found


def _one(tensors: Tensors, role: str, name: str) -> NDArray[Any]:
    return tensors[role][name]
