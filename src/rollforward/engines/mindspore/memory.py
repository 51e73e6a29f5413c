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

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from numpy.typing import NDArray

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

    def zeroing(self, buffers: ms.ParameterTuple) -> "Zeroing":
        """An object that sets all of these to zero."""
        ...


class Zeroing(Protocol):
    """Sets buffers to zero, repeatedly."""

    def compile(self) -> None:
        """Compile what needs compiling."""
        ...

    def __call__(self) -> None:
        """Every element of every buffer is 0 from now on."""
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

    def zeroing(self, buffers: ms.ParameterTuple) -> Zeroing:
        """Through the views, which are taken now."""
        return _Fill([buffer.asnumpy() for buffer in buffers])


class Copied:
    """`Memory` that the host does not see."""

    views = False

    def tensors(self, slots: Slots) -> Tensors:
        """Mappings whose arrays are copied to the host at each access, one by one."""
        return {role: _Copies(named, self.read) for role, named in slots.items()}

    def read(self, slot: Slot) -> NDArray[Any]:
        """A copy of what is there now."""
        return np.array(_seen(slot), copy=True)

    def write(self, slot: Slot, array: NDArray[Any]) -> None:
        """A new value for the parameter; the array is copied first, so the caller may change it."""
        if isinstance(slot, np.ndarray):
            np.copyto(slot, array)
        else:
            slot.set_data(ms.Tensor(np.array(array, copy=True)))

    def zeroing(self, buffers: ms.ParameterTuple) -> Zeroing:
        """On the device."""
        return _ZeroOnDevice(_ZeroBuffers(buffers))


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
    """name -> a fresh copy."""

    def __init__(self, slots: Mapping[str, Slot], read: Callable[[Slot], NDArray[Any]]) -> None:
        self._slots = slots
        self._read = read

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._read(self._slots[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


class _Fill:
    """`Zeroing` through views."""

    def __init__(self, views: list[NDArray[Any]]) -> None:
        self._views = views

    def compile(self) -> None:
        """Nothing to compile."""

    def __call__(self) -> None:
        for view in self._views:
            view.fill(0)


class _ZeroOnDevice:
    """`Zeroing` by a graph."""

    def __init__(self, cell: "_ZeroBuffers") -> None:
        self._cell = cell

    def compile(self) -> None:
        self._cell.compile()

    def __call__(self) -> None:
        self._cell()


class _ZeroBuffers(nn.Cell):
    def __init__(self, buffers: ms.ParameterTuple) -> None:
        super().__init__()
        self.buffers = buffers

    def construct(self) -> ms.Tensor:
        """0, when all is done."""
        done = ms.Tensor(0, ms.int32)
        for buffer in self.buffers:
            done = ops.depend(done, ops.assign(buffer, ops.zeros_like(buffer)))
        return done
