"""The live tensors to save: a background thread reads and writes them while their owner does other work.

    arrays on the host       read in place, chunk by chunk, until they are about to change: then what has
                             not been read yet is copied
    tensors on a device      copied to the host one by one, when it is their turn to be written; any
                             remaining ones are copied when they are about to change

Either way no byte is copied twice, and only a rank's own share is copied at all. Nothing is read
when a layout or a revision is enough. Copies from a device go into memory that is used again (`Buffers`):
while the writer keeps up, that is room for two tensors.

Left out: page-locked memory, which only the framework of a device can give.
"""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rollforward.store.tensorfile import CHUNK_BYTES, as_bytes, dtype_code
from rollforward.tensors import Held, Layout, Tensors, TensorSpec, arrays_of, layout_of


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


@runtime_checkable
class CopiesInto(Protocol):
    """A role of `Live.tensors` that can copy a tensor into memory that it is given."""

    def copy_into(self, name: str, target: NDArray[Any]) -> None:
        """Copy the tensor's current value; `target` has its shape and dtype."""
        ...


class Buffers:
    """Host memory for copies, taken and given back, by any thread."""

    def __init__(self) -> None:
        self.allocated = 0
        """Bytes, over all time."""
        self._free: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> NDArray[np.uint8]:
        """Memory of at least this many bytes: the smallest free piece that will do, or a new one.

        A new one takes the place of the largest free one, which was too small.
        """
        with self._lock:
            self._free.sort(key=len)
            fitting = next((at for at, piece in enumerate(self._free) if len(piece) >= size), None)
            if fitting is not None:
                return self._free.pop(fitting)
            if self._free:
                self._free.pop()
            self.allocated += size
        return np.empty(size, np.uint8)

    def give_back(self, piece: NDArray[np.uint8]) -> None:
        """Nobody reads it any more."""
        with self._lock:
            self._free.append(piece)


class HostArrays:
    """`Live` for arrays in host memory that may change at any time, without notice."""

    views = True

    def __init__(self, held: Callable[[], Held]) -> None:
        self._held = held

    def layout(self) -> Layout:
        """What each array is."""
        return layout_of(self._held())

    def tensors(self) -> Tensors:
        """The arrays themselves."""
        return arrays_of(self._held())

    def revision(self, role: str) -> int | None:  # noqa: ARG002 - required by the protocol
        """Unknown."""
        return None


def as_live(source: Live | Held | Callable[[], Held]) -> Live:
    """The source itself; arrays and pieces, or a function that returns them, wrapped in `HostArrays`."""
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

    `read` returns the live array itself when `in_place`, otherwise a copy that this source owns; `released`
    is called when it is no longer needed. `copied`: its chunks are copied before they are handed out.
    """

    def __init__(
        self,
        spec: TensorSpec,
        read: Callable[[], NDArray[Any]],
        guard: Guard,
        *,
        in_place: bool,
        copied: bool = False,
        released: Callable[[], None] = lambda: None,
    ) -> None:
        self.dtype = dtype_code(spec.dtype)
        self.box = spec.box
        self._read: Callable[[], NDArray[Any]] | None = read
        self._in_place = in_place
        self._copied = copied
        self._guard = guard
        self._released = released
        # Look up a live array now: its owner may replace it with another one.
        self._bytes = self._first_read(read) if in_place else None

    def _first_read(self, read: Callable[[], NDArray[Any]]) -> NDArray[np.uint8]:
        array = read()
        found = as_bytes(array)
        # A view in C order is read in place; anything else has to be copied, but only once.
        self._in_place = self._in_place and np.may_share_memory(found, array)
        return found

    def chunks(self) -> Generator[memoryview, None, None]:
        """Yields each chunk under the guard, so that it cannot change while it is being written.

        Unless it is a copy: whoever waits for the guard then does not wait until that is written.
        """
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
                chunk = data[begin : begin + CHUNK_BYTES]
                if not self._copied:
                    yield chunk
                else:
                    chunk = memoryview(bytes(chunk))
            if self._copied:
                yield chunk
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
            released, self._released = self._released, lambda: None
            self._read = self._bytes = None
        released()


Share = Mapping[str, Mapping[str, LiveSource]]
"""role -> name -> source, of the tensors that one rank handles."""


def sources_of(
    live: Live,
    names: Iterable[tuple[str, str]],
    guard: Guard,
    buffers: Buffers | None = None,
    *,
    copied: bool = False,
) -> Share:
    """The tensors of these (role, name), none of them copied yet. Copies from a device go into `buffers`.

    `copied`: writing them may wait for a network, and then nobody is to wait for that (`LiveSource`).
    """
    layout, tensors = live.layout(), live.tensors()
    buffers = buffers or Buffers()
    found: dict[str, dict[str, LiveSource]] = {}
    for role, name in names:
        spec, named = layout[role][name], tensors.get(role)
        if not live.views and isinstance(named, CopiesInto):
            copy = _Copy(named, name, spec, buffers)
            source = LiveSource(spec, copy.read, guard, in_place=False, copied=copied, released=copy.release)
        else:
            read = partial(_one, tensors, role, name)
            source = LiveSource(spec, read, guard, in_place=live.views, copied=copied)
        found.setdefault(role, {})[name] = source
    return found


class _Copy:
    """A tensor's copy, in memory of `Buffers`."""

    def __init__(self, source: CopiesInto, name: str, spec: TensorSpec, buffers: Buffers) -> None:
        self._source = source
        self._name = name
        self._spec = spec
        self._buffers = buffers
        self._memory: NDArray[np.uint8] | None = None

    def read(self) -> NDArray[Any]:
        self._memory = self._buffers.take(self._spec.nbytes)
        target = self._memory[: self._spec.nbytes].view(self._spec.dtype).reshape(self._spec.shape)
        self._source.copy_into(self._name, target)
        return target

    def release(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            self._buffers.give_back(memory)


def _one(tensors: Tensors, role: str, name: str) -> NDArray[Any]:
    return tensors[role][name]
