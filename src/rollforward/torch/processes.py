"""PyTorch's process group as the library needs it: small values, and arrays, of every process.

Values travel as JSON and arrays as bytes, in tensors of the group's own device; nothing is pickled.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from rollforward.agreement import AllGather
from rollforward.channel import AllSum
from rollforward.store.tensorfile import DTYPES, dtype_code
from rollforward.torch.arrays import Arrays


class Processes(TypedDict):
    """The arguments of `rollforward.open_run` that say who trains together, and how they talk."""

    rank: int
    world_size: int
    all_gather: AllGather
    all_sum: AllSum | None
    """With it, what a process exchanges for a checkpoint does not grow with their number."""


def process_group() -> Processes:
    """`open_run(path, **process_group())`; a single process if no group was initialised."""
    if not distributed.is_initialized():
        return Processes(rank=0, world_size=1, all_gather=lambda value: [value], all_sum=None)
    return Processes(
        rank=distributed.get_rank(),
        world_size=distributed.get_world_size(),
        all_gather=_all_gather,
        all_sum=_all_sum,
    )


def gather_arrays(arrays: Mapping[str, NDArray[Any]]) -> list[Arrays]:
    """Each process's arrays, in the order of ranks, on every process. Collective."""
    if not distributed.is_initialized():
        return [dict(arrays)]
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    told = _all_gather(
        [[name, dtype_code(array.dtype), list(array.shape)] for name, array in contiguous.items()]
    )
    contents = _gather_bytes(b"".join(array.tobytes() for array in contiguous.values()))
    return [_cut(described, content) for described, content in zip(told, contents, strict=True)]


def _cut(described: list[Any], content: bytes) -> Arrays:
    found: Arrays = {}
    begin = 0
    for name, code, shape in described:
        dtype = np.dtype(DTYPES[code])
        end = begin + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        found[name] = np.frombuffer(content[begin:end], dtype).reshape(shape).copy()
        begin = end
    return found


def _all_gather(value: Any) -> list[Any]:
    return [json.loads(content) for content in _gather_bytes(json.dumps(value).encode())]


def _all_sum(numbers: Sequence[int]) -> list[int]:
    total = torch.tensor(list(numbers), dtype=torch.int64, device=_device())
    distributed.all_reduce(total)
    return [int(number) for number in total.tolist()]


def _gather_bytes(content: bytes) -> list[bytes]:
    """All processes send as many bytes as the longest content has."""
    count, device = distributed.get_world_size(), _device()
    size = torch.tensor([len(content)], dtype=torch.int64, device=device)
    sizes = [torch.zeros_like(size) for _ in range(count)]
    distributed.all_gather(sizes, size)
    lengths = [int(each.item()) for each in sizes]
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    own = torch.from_numpy(padded).to(device)
    found = [torch.empty_like(own) for _ in range(count)]
    distributed.all_gather(found, own)
    return [each[:length].cpu().numpy().tobytes() for each, length in zip(found, lengths, strict=True)]


def _device() -> torch.device:
    """Where this group's collectives find their tensors."""
    backend = distributed.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
