"""One worker of `test_engine_workers.py`: `msrun ... engine_worker.py OUT CHUNKS SPREAD`.

However many workers there are, the same steps are done with the same chunks. SPREAD is 1 where each worker
keeps a part of the optimizer.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))

from engine_case import SETTINGS, initial_tensors, joined, restore, training_batch
from mindspore_case import ONE_LAYER

from rollforward import boxes
from rollforward.channel import Channel, all_sum_of
from rollforward.engines.mindspore.denormals import flushed
from rollforward.engines.mindspore.engine import create
from rollforward.engines.mindspore.parallel import connect, serve_scheduler
from rollforward.errors import NonFinite
from rollforward.grpo.addition import share

ROWS, SEEDS = 9, (0, 2, 4, 8, 9, 12)
"""Of a chunk: two micro-batches, the last of them with an empty row, and both of one shape to compile."""


class Twice(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        tiny = np.array([1, 5, 1 << 20], np.uint32).view(np.float32)
        self.tiny = ms.ParameterTuple([ms.Parameter(tiny, name="tiny")])

    def construct(self) -> ms.Tensor:
        return self.tiny[0] + self.tiny[0]


def main(out: Path, chunks: int, spread: bool) -> None:
    group = connect()
    # The first graph of this process, which starts threads: they must treat denormals as all others do.
    group.all_gather(group.rank)
    with flushed():
        cell = Twice()
        flushes = all(not cell().asnumpy().view(np.uint32).any() for _ in range(8))
    own = share(chunks, group.world_size, group.rank)
    settings = replace(
        SETTINGS,
        model_config=ONE_LAYER,
        optimizer=replace(SETTINGS.optimizer, max_grad_norm=0.3),
        chunks=len(own),
        parallel_optimizer=spread,
    )
    engine = create(settings, group)
    restore(engine, initial_tensors(engine))
    mine = joined(*(training_batch(engine, ROWS, SEEDS[chunk]) for chunk in own))
    numbers = {}
    for step in range(3):
        outcome = engine.update(mine, 1e-2)
        numbers[f"step {step}"] = np.array(
            [outcome.loss, outcome.grad_norm, outcome.kl, outcome.clip_fraction]
        )
        numbers[f"logprobs {step} of {own[0]} to {own[-1]}"] = outcome.logprobs
    before = engine.tensors()["policy_model"]["model.norm.weight"].copy()
    message = ""
    try:
        advantages = np.where(np.arange(len(mine.advantages)) == 1, np.nan, mine.advantages)
        last = group.rank == group.world_size - 1
        engine.update(replace(mine, advantages=advantages.astype(np.float32)) if last else mine, 1e-2)
    except NonFinite as error:
        message = error.message
    assert np.array_equal(before, engine.tensors()["policy_model"]["model.norm.weight"])
    # Longer than a frame on one rank only, and not ASCII.
    gathered = group.all_gather({"rank": group.rank, "text": "é" * (1 + 5000 * group.rank), "float": 0.1})
    expected = [{"rank": r, "text": "é" * (1 + 5000 * r), "float": 0.1} for r in range(group.world_size)]
    channel = Channel(group.all_gather, all_sum_of(group))
    # A value that is longer than a frame, and a number that takes all its words.
    value = "é" * 3000 if group.rank == 0 else None
    told = channel.tally(value, [group.rank, (1 << 128) - 1])
    ranks = range(group.world_size)
    tallied = told == ("é" * 3000, [sum(ranks), group.world_size * ((1 << 128) - 1)])
    tensors = {f"{role}/{name}": a for role, named in engine.tensors().items() for name, a in named.items()}
    rows = {
        f"rows of {role}/{name}": np.array([spec.offset[0], spec.offset[0] + spec.shape[0]])
        for role, named in engine.layout().items()
        for name, spec in named.items()
        if spec.piece_of
    }
    np.savez(
        out / f"{chunks}_{group.world_size}_{group.rank}_{int(spread)}.npz",
        **numbers,
        **rows,
        **tensors,
        message=message,
        gathered=gathered == expected,
        tallied=tallied,
        flushes=flushes,
    )


if __name__ == "__main__":
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        serve_scheduler()
    # Blocks of a few rows, so that tensors of this size are cut.
    boxes.BLOCK_BYTES = 1024
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
