"""Crash states of a run whose ranks hold slices of a cut model, which every start cuts otherwise.

A killed process leaves one of them too: that in which all that was written is there.
"""

import numpy as np
import pytest
from crash_run import Checker, Run, Violation, check_going_on, record, states
from held import Holding, layout, sliced
from test_crash_mutants import mutant_disk

from rollforward.boxes import Box, whole, within
from rollforward.models.sharding import Shard
from rollforward.storage import Storage
from rollforward.store import Manifest, read_boxes
from rollforward.store.contents import contents

WORKERS = 4
CUTS = {1: 2, 2: 4, 3: 1, 9: 2}
"""Start -> how many of the workers hold the model together; 9 is the one that goes on after a crash."""
QUERY, OUTPUT = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"
ADAPTER = "base_model.model.model.layers.0.mlp.down_proj."
SHAPES = {
    QUERY: (8, 6),
    OUTPUT: (6, 8),
    "model.norm.weight": (6,),
    f"{ADAPTER}lora_A.weight": (2, 8),
    f"{ADAPTER}lora_B.weight": (6, 2),
}
QUARTERS = {(row, 0): (2, 6) for row in (0, 2, 4, 6)}
HALVES = {(row, 0): (4, 6) for row in (0, 4)}


def weights(incarnation: int, step: int) -> dict[str, dict[str, np.ndarray]]:
    """The state of a small model, other numbers after each step; the reference changes once, at step 5."""

    def drawn(seed: int) -> dict[str, np.ndarray]:
        source = np.random.default_rng(seed)
        return {name: source.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}

    policy = drawn(100 * incarnation + step)
    moments = {f"adam_m.{name}": array / 3 for name, array in policy.items()}
    optimizer = {**moments, "global_step": np.array([step])}
    return {"policy_model": policy, "optimizer": optimizer, "ref": drawn(step >= 5)}


def slices(incarnation: int, step: int, rank: int, world_size: int) -> Holding:
    """What a worker has: its part of the model, which every group has once."""
    cut = CUTS[incarnation]
    state, (group, index) = weights(incarnation, step), divmod(rank, cut)
    return Holding(state, rank, sliced(state, Shard(index, cut)), copy=(group, world_size // cut))


class CutChecker(Checker):
    """Reads the parts of every cut, besides."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.stored: dict[int, dict[tuple[int, ...], tuple[int, ...]]] = {}
        """Start -> the pieces of the queries' weight: offset -> shape."""

    def _compare(self, storage: Storage, manifest: Manifest) -> None:
        super()._compare(storage, manifest)
        parts = contents(storage, manifest).tensors["policy_model", QUERY].parts
        boxes: list[Box] = [part.piece.box for part in parts]
        self.stored[manifest.incarnation] = {box.offset: box.shape for box in boxes}
        state = self._run.saved[manifest.order]
        for cut in (1, 2, 4):
            for index in range(cut):
                wanted = layout(state, sliced(state, Shard(index, cut)))
                for role, name, array in read_boxes(storage, manifest, wanted, near=index):
                    full = state[role][name]
                    part = full[within(wanted[role][name].box, whole(full.shape))]
                    if not np.array_equal(array, part):
                        raise Violation(f"{manifest.order}: {role} {name}, part {index} of {cut}, is another")


@pytest.fixture(scope="module")
def run() -> Run:
    return record(world_size=WORKERS, hold=slices)


def test_no_crash_loses_a_checkpoint_of_slices_or_shows_one_that_is_not_whole(run: Run) -> None:
    """Of the crash states every tenth: the others differ by one more operation of the same kind."""
    assert run.error is None
    checker, count = CutChecker(run), 0
    for count, (tree, reported) in enumerate(states(run), start=1):
        if count % 10 == 0:
            checker.check(tree, reported)
        if count % 500 == 0:
            check_going_on(tree, WORKERS, slices)
    assert count > 20_000
    assert checker.stored == {1: HALVES, 2: QUARTERS, 3: {(0, 0): (8, 6)}}


def test_the_harness_finds_one_worker_whose_slices_are_not_durable() -> None:
    """The last of a group, of whose folder only the name is missing."""
    found = record(
        storage=mutant_disk("fsync_folder", lambda path: path.endswith("/train/rank_3")),
        world_size=WORKERS,
        hold=slices,
    )
    checker = CutChecker(found)

    def crash_everywhere() -> None:
        for tree, reported in states(found):
            checker.check(tree, reported)

    with pytest.raises(Violation, match="rank_3"):
        crash_everywhere()
