"""One worker of `test_two_engine_workers.py`: `msrun ... engine_worker.py OUT`.

Run on one worker, the same steps are done with the whole batch.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))

from engine_case import SETTINGS, initial_tensors, restore, rows_of, training_batch
from mindspore_case import MODEL

from rollforward.engines.mindspore.engine import create
from rollforward.engines.mindspore.parallel import connect, serve_scheduler
from rollforward.errors import NonFinite

ROWS = 8


def main(out: Path) -> None:
    group = connect()
    settings = replace(
        SETTINGS,
        model_config={**MODEL, "num_hidden_layers": 1},
        optimizer=replace(SETTINGS.optimizer, max_grad_norm=0.3),
    )
    engine = create(settings, group)
    restore(engine, initial_tensors(engine))
    whole = training_batch(engine, ROWS)
    mine = rows_of(whole, slice(group.rank, None, group.world_size))
    numbers = {}
    for step in range(2):
        outcome = engine.update(mine, 1e-2)
        numbers[f"step {step}"] = np.array(
            [outcome.loss, outcome.grad_norm, outcome.kl, outcome.clip_fraction]
        )
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
    tensors = {f"{role}/{name}": a for role, named in engine.tensors().items() for name, a in named.items()}
    np.savez(
        out / f"{group.world_size}_{group.rank}.npz",
        **numbers,
        **tensors,
        message=message,
        gathered=gathered == expected,
    )


if __name__ == "__main__":
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        serve_scheduler()
    main(Path(sys.argv[1]))
