"""A process group as ranks talk over it: real processes over gloo."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

import rollforward
from rollforward.channel import Channel
from rollforward.storage import LocalStorage
from rollforward.store import find
from rollforward.torch import process_group
from rollforward.torch import processes as module


def join(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = Path(folder) / "meeting"
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)


def add_up(rank: int, world_size: int, folder: str) -> None:
    """What the channel says over sums and over a gather."""
    join(rank, world_size, folder)
    group = process_group()
    value = {"from": "the first", "long": "x" * 5000} if rank == 0 else None
    numbers = [2**128 - 1 if rank else 1, rank, 2**24 // world_size]
    expected = (
        {"from": "the first", "long": "x" * 5000},
        [1 + (world_size - 1) * (2**128 - 1), sum(range(world_size)), world_size * (2**24 // world_size)],
    )
    for all_sum in (group["all_sum"], None):
        assert Channel(group["all_gather"], all_sum).tally(value, numbers) == expected
    distributed.destroy_process_group()


def save(rank: int, world_size: int, folder: str) -> None:
    """A run that trains for two steps; what a rank receives for its second checkpoint goes into a file."""
    join(rank, world_size, folder)
    received: list[int] = []
    gather, total = module._gather_bytes, module._all_sum

    def counting_gather(content: bytes) -> list[bytes]:
        found = gather(content)
        received.append(sum(map(len, found)))
        return found

    def counting_sum(numbers: list[int]) -> list[int]:
        received.append(8 * len(numbers))
        return total(numbers)

    module._gather_bytes, module._all_sum = counting_gather, counting_sum
    tensors = {"policy": {"w": torch.zeros(8).numpy()}}
    with rollforward.open_run(f"{folder}/run", **process_group(), log=lambda _: None) as run:
        run.restore(tensors)
        for step in range(2):
            with run.updating(step):
                tensors["policy"]["w"] += 1
            run.outcome(step, loss=float(step))
            received.clear()
            run.checkpoint(step + 1, tensors)
    Path(folder, f"received_{rank}").write_text(str(sum(received)))
    distributed.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_and_a_gather_tell_the_same(tmp_path: Path, world_size: int) -> None:
    multiprocessing.spawn(add_up, (world_size, str(tmp_path)), nprocs=world_size)


def test_what_a_process_receives_for_a_checkpoint_does_not_grow_with_their_number(tmp_path: Path) -> None:
    received = {}
    for world_size in (2, 4):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        multiprocessing.spawn(save, (world_size, str(folder)), nprocs=world_size)
        assert find(LocalStorage(folder / "run")).manifest.world_size == world_size
        received[world_size] = {int((folder / f"received_{rank}").read_text()) for rank in range(world_size)}
    assert received[2] == received[4]
    assert len(received[2]) == 1
    assert received[2] != {0}
