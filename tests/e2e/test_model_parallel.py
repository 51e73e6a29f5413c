"""A model that is cut over workers computes what it does in one piece, in the same bits on any replicas."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msrun import run_script

pytestmark = pytest.mark.engine

WORKER = Path(__file__).with_name("model_parallel_worker.py")
FAMILIES = ("llama", "qwen2", "qwen3")
"""By name: what they have besides, biases and norms of queries and keys, `wide` has too."""
RUNS = [
    (1, 1, 0, ("wide", "wide-lora")),
    (2, 2, 0, ("wide", "wide-lora", "wide-recompute")),
    (4, 2, 1, ("wide",)),
    (4, 2, 1, ("wide-lora",)),
    (4, 4, 0, ("wide", "wide-lora")),
]
"""Workers, how many of them hold a model together, whether replicas spread the optimizer, which models."""
CUT: list[Any] = [(case, 2, 2, 0) for case in ("wide", "wide-lora")]
CUT += [pytest.param((case, 4, 4, 0), marks=pytest.mark.slow) for case in ("wide", "wide-lora")]
CUT_ONES = re.compile(r"_proj\.weight|(q|k|v|gate|up)_proj\.lora_B\.weight|(o|down)_proj\.lora_A\.weight")
"""In the names of matrices of which each worker has a part."""
Found = dict[tuple[str, int, int, int], list[dict[str, Any]]]
"""(case, workers, model_parallel, spread) -> what each rank found."""


class Launches(Found):
    """A launch is made when something that it finds is asked for: those by name cost nothing else."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self._out = out

    def __missing__(self, key: tuple[str, int, int, int]) -> list[dict[str, Any]]:
        (cases,) = (cases for *numbers, cases in RUNS if key[0] in cases and (*numbers,) == key[1:])
        run(self._out, *key[1:], cases)
        for case in cases:
            self[case, *key[1:]] = results(self._out, case, *key[1:])
        return self[key]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return Launches(tmp_path_factory.mktemp("parallel"))


def results(out: Path, case: str, workers: int, model_parallel: int, spread: int) -> list[dict[str, Any]]:
    """What each rank found."""
    name = f"{case}_{workers}_{model_parallel}_{spread}"
    return [dict(np.load(out / f"{name}_{rank}.npz")) for rank in range(workers)]


def run(out: Path, workers: int, model_parallel: int, spread: int, cases: tuple[str, ...]) -> None:
    logs = out / f"log_{cases[0]}_{workers}_{model_parallel}_{spread}"
    run_script(WORKER, out, model_parallel, spread, *cases, workers=workers, folder=out, logs=logs)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_so_it_is_in_each_family(tmp_path: Path, case: str) -> None:
    found, cut = Found(), (case, 2, 2, 0)
    for workers in (1, 2):
        run(tmp_path, workers, workers, 0, (case,))
        found[case, workers, workers, 0] = results(tmp_path, case, workers, workers, 0)
    test_logits_are_those_of_the_model_in_one_piece(found, cut)
    test_all_workers_draw_the_samples_that_one_draws(found, cut)
    test_loss_and_logprobs_and_gradient_are_those_of_the_model_in_one_piece(found, cut)
    test_each_worker_has_its_part_only(found, cut)


def joined(ranks: list[dict[str, Any]], key: str) -> np.ndarray:
    """A tensor of all workers, from their parts; what several have must have the same bits."""
    _, role, name = key.split(" ")
    boxes = [each[f"box {role} {name}"] for each in ranks]
    whole = np.full(np.max([offset + shape for offset, shape in boxes], axis=0), np.nan)
    for each, (offset, shape) in zip(ranks, boxes, strict=True):
        place = tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
        there = whole[place]
        assert (np.isnan(there) | (there == each[key])).all(), key
        whole[place] = each[key]
    assert not np.isnan(whole).any(), key
    return whole


def tensors(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    keys = {key for each in ranks for key in each if key.startswith(("0 ", "1 "))}
    return {key: joined([each for each in ranks if key in each], key) for key in sorted(keys)}


@pytest.mark.parametrize("cut", CUT)
def test_logits_are_those_of_the_model_in_one_piece(found: Found, cut: tuple[str, int, int, int]) -> None:
    alone = found[cut[0], 1, 1, 0][0]["logits"]
    for each in found[cut]:
        np.testing.assert_allclose(each["logits"], alone, atol=1e-5, rtol=1e-5)
        assert each["logits"].tobytes() == found[cut][0]["logits"].tobytes()


@pytest.mark.parametrize("cut", CUT)
def test_all_workers_draw_the_samples_that_one_draws(found: Found, cut: tuple[str, int, int, int]) -> None:
    alone = found[cut[0], 1, 1, 0][0]
    for each in found[cut]:
        np.testing.assert_array_equal(each["samples"], alone["samples"])
        np.testing.assert_array_equal(each["lengths"], alone["lengths"])


@pytest.mark.parametrize("cut", CUT)
def test_loss_and_logprobs_and_gradient_are_those_of_the_model_in_one_piece(
    found: Found, cut: tuple[str, int, int, int]
) -> None:
    alone = found[cut[0], 1, 1, 0][0]
    for each in found[cut]:
        for name in ("numbers 0", "logprobs 0", "reference"):
            np.testing.assert_allclose(each[name], alone[name], atol=1e-5, rtol=1e-5)
            assert each[name].tobytes() == found[cut][0][name].tobytes(), name
    whole = tensors(found[cut])
    for name, array in tensors([alone]).items():
        if name.startswith("0 optimizer adam_m."):
            # After one step from zero the first moment is 0.1 times the gradient.
            np.testing.assert_allclose(whole[name], array, atol=1e-6, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("cut", CUT)
def test_each_worker_has_its_part_only(found: Found, cut: tuple[str, int, int, int]) -> None:
    alone = found[cut[0], 1, 1, 0][0]
    for each in found[cut]:
        of_matrices = [name for name in each if name.startswith("1 policy_model") and CUT_ONES.search(name)]
        assert len(of_matrices) == 7 * (1 if cut[0].startswith("wide") else 2), "of each layer"
        for name in of_matrices:
            assert each[name].size * cut[2] == alone[name].size, name


@pytest.mark.parametrize("cut", CUT)
def test_the_memory_that_is_computed_is_what_each_worker_has(
    found: Found, cut: tuple[str, int, int, int]
) -> None:
    alone = found[cut[0], 1, 1, 0][0]
    for each in found[cut]:
        sizes = {name: array.tolist() for name, array in each.items() if name.startswith("bytes ")}
        assert sizes.keys() == {
            f"bytes {name}" for name in ("weights", "reference", "moments", "new_gradients", "cache")
        }
        assert 0 < sizes["bytes weights"][0] < alone["bytes weights"][0]
        for name, (held, computed) in sizes.items():
            assert held == computed, name


@pytest.mark.parametrize("case", ["wide", pytest.param("wide-lora", marks=pytest.mark.slow)])
def test_the_same_cut_learns_the_same_bits_on_any_number_of_replicas(found: Found, case: str) -> None:
    one, several = found[case, 2, 2, 0], found[case, 4, 2, 1]
    expected, given = tensors(one), tensors(several)
    assert expected.keys() == given.keys()
    for name, array in expected.items():
        assert array.tobytes() == given[name].tobytes(), name
    for each in several:
        for name in ("samples", "numbers 0", "numbers 1", "logprobs 0", "logprobs 1"):
            assert each[name].tobytes() == one[0][name].tobytes(), name


def test_what_is_computed_again_has_the_same_bits(found: Found) -> None:
    kept, again = found["wide", 2, 2, 0], found["wide-recompute", 2, 2, 0]
    for one, other in zip(kept, again, strict=True):
        assert one.keys() - other.keys() == {"logits", "samples", "lengths"}
        for name, array in other.items():
            assert array.tobytes() == one[name].tobytes(), name


def test_replicas_that_spread_the_optimizer_keep_half_of_their_parts_moments_each(found: Found) -> None:
    held = [
        sum(array.size for name, array in each.items() if name.startswith("1 optimizer adam_m."))
        for each in found["wide", 4, 2, 1]
    ]
    whole = sum(
        array.size
        for name, array in found["wide", 2, 2, 0][0].items()
        if name.startswith("1 optimizer adam_m.")
    )
    assert max(held) < 0.65 * whole, (held, whole)
    (computed,) = {int(each["bytes moments"][1]) for each in found["wide", 4, 2, 1]}
    assert 4 * 2 * sum(held) == pytest.approx(4 * computed, abs=16), "on average"
