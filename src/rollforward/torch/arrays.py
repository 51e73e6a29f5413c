"""Tensors as NumPy arrays, and back, bit for bit.

NumPy has no BF16 and no FP8 of its own; those tensors become arrays of `ml_dtypes` types over the same bytes.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

_EXTRA: Mapping[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}
"""A type that NumPy lacks -> one of the same size that it has, and the type of `ml_dtypes`."""

_BACK = {np.dtype(theirs): (through, ours) for ours, (through, theirs) in _EXTRA.items()}


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's elements: the memory itself for a contiguous tensor in host memory, otherwise a copy."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _EXTRA:
        through, theirs = _EXTRA[tensor.dtype]
        return tensor.view(through).numpy().view(theirs)
    found: NDArray[Any] = tensor.numpy()
    return found


def as_tensor(array: NDArray[Any], device: torch.device | str = "cpu") -> torch.Tensor:
    """The inverse of `as_array`; in host memory it shares the array's."""
    if array.dtype in _BACK:
        through, ours = _BACK[array.dtype]
        raw = array.view(np.int16 if through is torch.int16 else np.uint8)
        return torch.from_numpy(raw).view(ours).to(device)
    return torch.from_numpy(array).to(device)


class HostCopies:
    """Tensors as arrays to write a checkpoint from: live memory on the host, one pinned copy on a device.

    Each call copies into the same memory again. At least one `Run.updating` must lie between two calls: it
    copies aside whatever the last checkpoint has not written yet.
    """

    def __init__(self) -> None:
        self._pinned: dict[str, torch.Tensor] = {}

    def arrays(self, tensors: Mapping[str, torch.Tensor], role: str = "") -> Arrays:
        """`as_array` of each; `role` keeps tensors of the same name apart."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            found[name] = tensor if tensor.device.type == "cpu" else self._copied(f"{role} {name}", tensor)
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: as_array(tensor) for name, tensor in found.items()}

    def _copied(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = self._pinned.get(key)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            pinned = tensor.device.type == "cuda"
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            self._pinned[key] = kept
        kept.copy_(tensor.detach(), non_blocking=True)
        return kept


def put_back(tensors: Mapping[str, torch.Tensor], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy arrays of `HostCopies` into the tensors, where they are not over the same memory."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not _shares(tensor, arrays[name]):
                tensor.copy_(as_tensor(arrays[name]))


def _shares(tensor: torch.Tensor, array: NDArray[Any]) -> bool:
    return tensor.device.type == "cpu" and tensor.data_ptr() == array.__array_interface__["data"][0]
