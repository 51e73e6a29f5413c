"""However many data-parallel workers under `msrun` share a step, they learn the same bits."""

from pathlib import Path

import numpy as np
import pytest
from msrun import run_script

pytestmark = pytest.mark.engine

WORKER = Path(__file__).with_name("engine_worker.py")
RUNS = [(6, 1, 0), (6, 2, 0), (6, 3, 1)]
"""Chunks of a step, workers, whether each keeps a part of the optimizer.

All of one number of chunks, so that one run of a worker alone is what they are compared with: each worker
costs a process that compiles. Four are tried in `test_model_parallel.py`, and by name in
`test_engine_kills.py`.
"""
Results = dict[tuple[int, ...], dict[str, np.ndarray]]
"""(chunks, workers, rank, whether spread) -> what the worker found."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("workers")
    for chunks, workers, spread in RUNS:
        run(out, chunks, workers, spread)
    return {tuple(map(int, path.stem.split("_"))): dict(np.load(path)) for path in out.glob("*.npz")}


def run(out: Path, chunks: int, workers: int, spread: int) -> None:
    logs = out / f"log_{chunks}_{workers}_{spread}"
    run_script(WORKER, out, chunks, spread, workers=workers, folder=out, logs=logs)


def test_values_are_gathered_in_the_order_of_ranks(results: Results) -> None:
    assert all(result["gathered"] for result in results.values())


def test_sums_and_the_first_workers_value_reach_all(results: Results) -> None:
    assert all(result["tallied"] for result in results.values())
    assert all(result["flushes"] for result in results.values())


@pytest.mark.parametrize(("chunks", "workers", "spread"), [run for run in RUNS if run[1] > 1])
def test_any_number_of_workers_learns_the_same_bits(
    results: Results, chunks: int, workers: int, spread: int
) -> None:
    alone = results[chunks, 1, 0, 0]
    assert alone["optimizer/global_step"] == 3
    assert len({alone[f"step {step}"].tobytes() for step in range(3)}) == 3
    for rank in range(workers):
        for name, array in results[chunks, workers, rank, spread].items():
            if name.startswith("logprobs"):
                whole = alone[f"{' '.join(name.split()[:2])} of 0 to {chunks - 1}"]
                assert array.tobytes() == np.split(whole, workers)[rank].tobytes(), name
            elif name.startswith(("policy_model/", "step", "ref/")):
                assert array.tobytes() == alone[name].tobytes(), name


@pytest.mark.parametrize(("chunks", "workers", "spread"), [run for run in RUNS if run[1] > 1])
def test_the_moments_are_the_same_bits_whoever_keeps_them(
    results: Results, chunks: int, workers: int, spread: int
) -> None:
    alone = results[chunks, 1, 0, 0]
    names = {name for name in alone if name.startswith("optimizer/adam_")}
    kept = {name: np.zeros(len(alone[name]), int) for name in names}
    for rank in range(workers):
        found = results[chunks, workers, rank, spread]
        for name in names & found.keys():
            begin, end = found.get(f"rows of {name}", np.array([0, len(alone[name])]))
            assert found[name].tobytes() == alone[name][begin:end].tobytes(), name
            kept[name][begin:end] += 1
    copies = 1 if spread else workers
    assert all((count == copies).all() for count in kept.values())
    if spread:
        found_by = [results[chunks, workers, rank, 1] for rank in range(workers)]
        owned = [sum(found[name].size for name in names & found.keys()) for found in found_by]
        assert max(owned) < 1.5 * sum(owned) / workers, owned


def test_a_bad_sample_of_one_worker_stops_all_and_is_named(results: Results) -> None:
    for (_, workers, *_), found in results.items():
        assert f"samples [1] of worker {workers - 1}" in str(found["message"])
