"""How others save and load the same state, for `benchmarks/checkpoint.py`.

Each way is a `Way`: `save` returns when the caller may go on, `settle` when the background has
ended, `files` are what it wrote (to be synced, since most do not), `load` puts the state back
into arrays that exist, as a model's do. A peer that is not installed is left out.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

State = Mapping[str, np.ndarray]


def nothing() -> None:
    """For ways that have no background."""


@dataclass(frozen=True)
class Way:
    """One way to save and load."""

    name: str
    save: Callable[[], Any]
    load: Callable[[], Any]
    files: Callable[[], list[Path]]
    settle: Callable[[], None] = nothing
    remark: str = ""


def mindspore_ways(state: State, folder: Path) -> Iterator[Way]:
    """`save_checkpoint` in both formats, on the caller's time and asynchronously; `load_checkpoint`."""
    try:
        import mindspore as ms
    except ImportError:
        return
    target = {name: np.zeros_like(array) for name, array in state.items()}
    tensors = [{"name": name, "data": ms.Tensor.from_numpy(array)} for name, array in state.items()]

    def wait() -> None:
        while ms.async_ckpt_thread_status():
            time.sleep(0.002)

    def load(path: Path, form: str, more: Mapping[str, Any]) -> None:
        # Parameters of a safetensors file come mapped, not read; the copy is what reads them.
        for name, parameter in ms.load_checkpoint(str(path), format=form, **more).items():
            np.copyto(target[name], parameter.asnumpy())

    def way(name: str, form: str, *, asynchronous: bool = False, checked: bool = False) -> Way:
        path = folder / f"ms_{asynchronous}_{checked}.{form}"
        more = {"crc_check": True} if checked else {}
        return Way(
            name,
            lambda: ms.save_checkpoint(tensors, str(path), async_save=asynchronous, format=form, **more),
            lambda: load(path, form, more),
            lambda: [path],
            wait if asynchronous else nothing,
            "CRC" if checked else "",
        )

    yield way("MindSpore ckpt", "ckpt")
    yield way("MindSpore ckpt, crc_check", "ckpt", checked=True)
    yield way("MindSpore ckpt, async_save", "ckpt", asynchronous=True)
    yield way("MindSpore safetensors", "safetensors")
    yield way("MindSpore safetensors, async_save", "safetensors", asynchronous=True)


def torch_ways(state: State, folder: Path) -> Iterator[Way]:
    """`torch.save`, safetensors, and Distributed Checkpoint in one process."""
    try:
        import torch
        import torch.distributed.checkpoint as dcp
        from safetensors.torch import load_file, save_file
    except ImportError:
        return
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    pt, st, plain, background = (
        folder / name for name in ("torch.pt", "torch.safetensors", "dcp", "dcp_async")
    )
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    pending: list[Any] = []

    def files(path: Path) -> list[Path]:
        return sorted(item for item in path.rglob("*") if item.is_file())

    def load_into(path: Path) -> None:
        dcp.load(target, checkpoint_id=path, no_dist=True)

    def copy_in(loaded: Mapping[str, Any]) -> None:
        for name, tensor in loaded.items():
            target[name].copy_(tensor)

    def save(path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        dcp.save(tensors, checkpoint_id=path, no_dist=True)

    def save_async() -> None:
        shutil.rmtree(background, ignore_errors=True)
        pending.append(dcp.async_save(tensors, checkpoint_id=background, no_dist=True))

    yield Way("torch.save", lambda: torch.save(tensors, pt), lambda: copy_in(torch.load(pt)), lambda: [pt])
    yield Way(
        "safetensors.torch", lambda: save_file(tensors, st), lambda: copy_in(load_file(st)), lambda: [st]
    )
    yield Way(
        "DCP save",
        lambda: save(plain),
        lambda: load_into(plain),
        lambda: files(plain),
        remark="fsyncs itself",
    )
    yield Way(
        "DCP async_save",
        save_async,
        lambda: load_into(background),
        lambda: files(background),
        lambda: pending.pop().result() and None,
        "fsyncs itself",
    )
