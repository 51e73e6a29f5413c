"""How the host reaches an engine's tensors: in place where it can, by copies where it cannot.

    Viewed     the host sees the parameters' own memory: `Parameter.asnumpy()` is a view, its address
               stays the same from step to step, and what is written through it is what the next step
               computes with (MindSpore 2.10 on the CPU)
    Copied     devices with a memory of their own: reading copies to the host, writing gives the
               framework a new value, and nothing is computed on the host's side of a step

`memory_of` chooses by the device, here and nowhere else. `Copied` has been tested on the CPU only,
where it gives the same bits as `Viewed`, even when the thread that writes a checkpoint reads while
the engine generates; it has not run on an Ascend or a GPU.

Left out of `Copied`: copying the policy to the reference without going through the host.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

from rollforward.engines.mindspore.compiling import Graphs
from rollforward.errors import DeviceUnavailable
from rollforward.tensors import Layout, Tensors, TensorSpec

Slot: TypeAlias = "ms.Parameter | NDArray[Any]"
"""Where a tensor lives: a parameter, or an array that never leaves the host."""
Slots: TypeAlias = Mapping[str, Mapping[str, Slot]]
"""role -> name -> slot."""


class Memory(Protocol):
    """The host's way to the tensors of one device."""

    views: bool
    """See `grpo.ports.Engine.views`."""

    def tensors(self, slots: Slots) -> Tensors:
        """What `Engine.tensors` gives for these slots; called once."""
        ...

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        """Put an array of the slot's dtype and shape in place."""
        ...

    def sums(self, buffers: ms.ParameterTuple, slots: int) -> "Sums":
        """Sums in these buffers, and so many slots to put one aside."""
        ...


class Sums(Protocol):
    """Buffers that gradients are added in, and slots of the same sizes; see `grpo.addition`."""

    def compile(self, graphs: Graphs) -> None:
        """Compile what needs compiling."""
        ...

    def clear(self) -> None:
        """Every element of every buffer is 0 from now on."""
        ...

    def keep(self, slot: int) -> None:
        """The slot becomes a copy of the buffers."""
        ...

    def take(self, slot: int) -> None:
        """The buffers become a copy of the slot."""
        ...

    def add(self, slot: int) -> None:
        """The slot is added to the buffers."""
        ...


class Viewed:
    """`Memory` that the host sees."""

    views = True

    def tensors(self, slots: Slots) -> Tensors:
        """Views; they keep showing the newest values."""
        return {role: {name: _seen(slot) for name, slot in named.items()} for role, named in slots.items()}

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        """Through the view."""
        np.copyto(_seen(slot), array)

    def sums(self, buffers: ms.ParameterTuple, slots: int) -> Sums:
        """Through the views, which are taken now; NumPy adds with the bits that MindSpore adds with."""
        return _SumsOnHost([buffer.asnumpy() for buffer in buffers], slots)


class Copied:
    """`Memory` that the host does not see."""

    views = False

    def tensors(self, slots: Slots) -> Tensors:
        """Mappings whose arrays are copied to the host at each access, one by one."""
        return {role: _Copies(named, self) for role, named in slots.items()}

    def read(self, slot: Slot) -> NDArray[Any]:
        """A copy of what is there now."""
        copy = np.empty(slot.shape, _spec(slot).dtype)
        self.read_into(slot, copy)
        return copy

    def read_into(self, slot: Slot, target: NDArray[Any]) -> None:
        """Copy what is there now into memory of the host."""
        np.copyto(target, _seen(slot), casting="no")

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        """A new value for the parameter; the array is copied first, so the caller may change it."""
        if isinstance(slot, np.ndarray):
            np.copyto(slot, array)
        else:
            slot.set_data(ms.Tensor(np.array(array, copy=True)))

    def sums(self, buffers: ms.ParameterTuple, slots: int) -> Sums:
        """On the device."""
        return _SumsOnDevice(buffers, slots)


def memory_of(device_target: str) -> Memory:
    """The way to the memory of a device. `device_target`: as MindSpore names it."""
    return Viewed() if device_target == "CPU" else Copied()


def use_device(device_target: str) -> None:
    """Compute on this device from now on, in graph mode. DeviceUnavailable if this MindSpore cannot."""
    try:
        ms.set_context(mode=ms.GRAPH_MODE, device_target=device_target)
    except (RuntimeError, ValueError) as error:
        raise DeviceUnavailable(
            f"MindSpore cannot compute on {device_target!r}: {str(error).strip().splitlines()[0]}",
            hint="install the MindSpore of that device, or set context.device_target: CPU",
        ) from error


def layout_of_slots(slots: Slots) -> Layout:
    """What fits into the slots, without reading them."""
    return {role: {name: _spec(slot) for name, slot in named.items()} for role, named in slots.items()}


def _spec(slot: Slot) -> TensorSpec:
    # By its name, `Float32` and so on: since 2.7 MindSpore warns about its own `dtype_to_nptype`.
    dtype = slot.dtype if isinstance(slot, np.ndarray) else str(slot.dtype).lower()
    return TensorSpec.whole(dtype, tuple(slot.shape))


def _seen(slot: Slot) -> NDArray[Any]:
    return slot if isinstance(slot, np.ndarray) else slot.asnumpy()


class _Copies(Mapping[str, NDArray[Any]]):
    """name -> a fresh copy; a `store.live.CopiesInto`."""

    def __init__(self, slots: Mapping[str, Slot], memory: Copied) -> None:
        self._slots = slots
        self._memory = memory

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._memory.read(self._slots[name])

    def copy_into(self, name: str, target: NDArray[Any]) -> None:
        """Into memory that is used again: a fresh copy costs its pages as well."""
        self._memory.read_into(self._slots[name], target)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


class _SumsOnHost:
    """`Sums` through views."""

    def __init__(self, views: list[NDArray[Any]], slots: int) -> None:
        self._views = views
        self._slots = [[np.empty_like(view) for view in views] for _ in range(slots)]

    def compile(self, graphs: Graphs) -> None:
        """Nothing to compile."""

    def clear(self) -> None:
        for view in self._views:
            view.fill(0)

    def keep(self, slot: int) -> None:
        for view, kept in zip(self._views, self._slots[slot], strict=True):
            np.copyto(kept, view)

    def take(self, slot: int) -> None:
        for view, kept in zip(self._views, self._slots[slot], strict=True):
            np.copyto(view, kept)

    def add(self, slot: int) -> None:
        # What overflows is not finite, and the norm will say so.
        with np.errstate(all="ignore"):
            for view, kept in zip(self._views, self._slots[slot], strict=True):
                np.add(view, kept, out=view)


class _SumsOnDevice:
    """`Sums` by graphs."""

    def __init__(self, buffers: ms.ParameterTuple, slots: int) -> None:
        self._clear = _Clear(buffers)
        kept = [
            ms.ParameterTuple(
                [
                    ms.Parameter(np.zeros(buffer.shape, dtype=np.float32), name=f"kept_{slot}.{buffer.name}")
                    for buffer in buffers
                ]
            )
            for slot in range(slots)
        ]
        self._keep = [_Copy(buffers, slot) for slot in kept]
        self._take = [_Copy(slot, buffers) for slot in kept]
        self._add = [_Add(slot, buffers) for slot in kept]

    def compile(self, graphs: Graphs) -> None:
        cells: list[nn.Cell] = [self._clear, *self._keep, *self._take, *self._add]
        for number, cell in enumerate(cells):
            graphs.compile(f"sums_{number}", cell)

    def clear(self) -> None:
        self._clear()

    def keep(self, slot: int) -> None:
        self._keep[slot]()

    def take(self, slot: int) -> None:
        self._take[slot]()

    def add(self, slot: int) -> None:
        self._add[slot]()


class _Clear(nn.Cell):
    def __init__(self, buffers: ms.ParameterTuple) -> None:
        super().__init__()
        self.buffers = buffers

    def construct(self) -> ms.Tensor:
        """0, when all is done."""
        done = ms.Tensor(0, ms.int32)
        for buffer in self.buffers:
            done = ops.depend(done, ops.assign(buffer, ops.zeros_like(buffer)))
        return done


class _Copy(nn.Cell):
    def __init__(self, source: ms.ParameterTuple, target: ms.ParameterTuple) -> None:
        super().__init__()
        self.source = source
        self.target = target

    def construct(self) -> ms.Tensor:
        """0, when all is done."""
        done = ms.Tensor(0, ms.int32)
        for source, target in zip(self.source, self.target):  # noqa: B905 (the graph compiler has no strict)
            done = ops.depend(done, ops.assign(target, source))
        return done


class _Add(nn.Cell):
    def __init__(self, source: ms.ParameterTuple, target: ms.ParameterTuple) -> None:
        super().__init__()
        self.source = source
        self.target = target

    def construct(self) -> ms.Tensor:
        """0, when all is done."""
        done = ms.Tensor(0, ms.int32)
        for source, target in zip(self.source, self.target):  # noqa: B905 (the graph compiler has no strict)
            done = ops.depend(done, ops.assign_add(target, source))
        return done
