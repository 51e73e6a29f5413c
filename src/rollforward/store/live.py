"""What is saved, where it lives: read by a thread that writes, while its owner does something else.

    arrays of the host       read in place, chunk by chunk, until they are about to change: then what has
                             not been read yet is copied
    tensors on a device      copied to the host when their turn comes to be written, one by one; what has
                             had no turn when they are about to change is copied then

Either way no byte is copied twice, and only a rank's own share is copied at all. What a layout
or a revision can tell is not read.
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
    """What checkpoints are made of; `grpo.ports.Engine` fits, which the store does not know."""

    views: bool
    """Whether `tensors` shows the live memory itself. Where not, each access to a tensor gives a new copy."""

    def layout(self) -> Layout:
        """What there is, without reading any of it."""
        ...

    def tensors(self) -> Tensors:
        """The tensors as they are now. Another thread may read them while nothing changes them."""
        ...

    def revision(self, role: str) -> int | None:
        """The same number as before means that the role's bytes are those of then. None: not known."""
        ...


class HostArrays:
    """`Live` arrays in the host's memory, of which nobody knows when they change."""

    views = True

    def __init__(self, tensors: Callable[[], Tensors]) -> None:
        self.tensors = tensors

    def layout(self) -> Layout:
        """That of the arrays; they are whole."""
        return layout_of(self.tensors())

    def revision(self, role: str) -> int | None:  # noqa: ARG002 - as the protocol has it
        """Not known."""
        return None


def as_live(source: Live | Tensors | Callable[[], Tensors]) -> Live:
    """The source itself; arrays, or what gives them, as `HostArrays`."""
    if isinstance(source, Mapping):
        return HostArrays(lambda: source)
    return HostArrays(source) if callable(source) else source


def revisions_of(live: Live) -> dict[str, int]:
    """role -> revision, of those roles that have one."""
    told = {role: live.revision(role) for role in live.layout()}
    return {role: revision for role, revision in told.items() if revision is not None}


class Guard:
    """A lock between the thread that writes and the caller who waits to change the tensors.

    A plain lock is not enough: the writer takes it again for the next chunk at once, and the
    caller might get no turn until the last one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.Event()
        self._free.set()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """For the writer; stands back while the caller waits."""
        self._free.wait()
        with self._lock:
            yield

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """For the caller; waits for one chunk at most, or for one tensor to be copied from its device."""
        self._free.clear()
        try:
            with self._lock:
                yield
        finally:
            self._free.set()


class LiveSource:
    """A live tensor as a `TensorSource`.

    `read` gives the live array itself when `in_place`; else a copy, which then belongs to this source.
    """

    def __init__(
        self, spec: TensorSpec, read: Callable[[], NDArray[Any]], guard: Guard, *, in_place: bool
    ) -> None:
        self.dtype = dtype_code(spec.dtype)
        self.shape = spec.shape
        self._read: Callable[[], NDArray[Any]] | None = read
        self._in_place = in_place
        self._guard = guard
        # A live array is looked up now: its owner may put another one in its place.
        self._bytes = self._first_read(read) if in_place else None

    def _first_read(self, read: Callable[[], NDArray[Any]]) -> NDArray[np.uint8]:
        array = read()
        found = as_bytes(array)
        # A view in C order is read in place; anything else has to be copied, and only once.
        self._in_place = self._in_place and np.may_share_memory(found, array)
        return found

    def chunks(self) -> Generator[memoryview, None, None]:
        """Each chunk is given out under the guard, so that it cannot change while it is written."""
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
        """Read from a copy from now on; returns the bytes that were copied. The caller holds the guard."""
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
        """Nothing more will be read; a copy is let go."""
        with self._guard.reading():
            self._read = self._bytes = None


Share = Mapping[str, Mapping[str, LiveSource]]
"""role -> name -> source, of the tensors that one rank has to do with."""


def sources_of(live: Live, names: Iterable[tuple[str, str]], guard: Guard) -> Share:
    """The tensors of these (role, name), none of which is copied yet."""
    layout, tensors = live.layout(), live.tensors()
    found: dict[str, dict[str, LiveSource]] = {}
    for role, name in names:
        read = partial(_one, tensors, role, name)
        source = LiveSource(layout[role][name], read, guard, in_place=live.views)
        found.setdefault(role, {})[name] = source
    return found


def _one(tensors: Tensors, role: str, name: str) -> NDArray[Any]:
    return tensors[role][name]
