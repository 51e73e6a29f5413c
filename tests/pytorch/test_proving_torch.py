"""What torch saved is compared leaf by leaf, and nothing in it is run."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollforward.proving.leavings import look_at
from rollforward.proving.tensors import TensorsCompared, compare_tensors


def compare(root: Path, name: str, a: Any, b: Any) -> TensorsCompared:
    for folder, content in (("a", a), ("b", b)):
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    return compare_tensors(look_at(root / "a"), look_at(root / "b"))


def optimizer_state(steps: int) -> Any:
    """Of a real optimizer, after some steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    return optimizer.state_dict()


def test_an_optimizers_state_is_compared_leaf_by_leaf(tmp_path: Path) -> None:
    name = "checkpoint-2/optimizer.pt"
    same = compare(tmp_path, name, optimizer_state(2), optimizer_state(2))
    assert (same.differences, same.skipped) == ([], {})
    assert (name, "state.0.exp_avg") in same.names
    assert (name, "param_groups.0.lr") in same.names
    changed = optimizer_state(2)
    changed["state"][1]["exp_avg"][0] += 1
    changed["param_groups"][0]["lr"] = 0.05
    changed["param_groups"][0]["foreach"] = True
    found = compare(tmp_path, name, optimizer_state(2), changed)
    assert {(item.name, item.what) for item in found.differences} == {
        ("state.1.exp_avg", "values"),
        ("param_groups.0.lr", "values"),
        ("param_groups.0.foreach", "other"),
    }


def test_random_state_of_python_numpy_and_torch_is_compared(tmp_path: Path) -> None:
    def states(seed: int) -> Any:
        chance = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        numbers = np.random.RandomState(seed).get_state()
        return {"python": chance.getstate(), "numpy": numbers, "cpu": generator.get_state()}

    same = compare(tmp_path, "checkpoint-2/rng_state.pth", states(1), states(1))
    assert (same.differences, same.skipped) == ([], {})
    found = compare(tmp_path, "checkpoint-2/rng_state.pth", states(1), states(2))
    assert {item.name.partition(".")[0] for item in found.differences} == {"python", "numpy", "cpu"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_one_element_of_any_type_is_a_difference(tmp_path: Path, dtype: Any) -> None:
    a = torch.tensor([0, 1, 1], dtype=dtype)
    b = torch.tensor([0, 1, 0], dtype=dtype)
    assert compare(tmp_path, "model.bin", {"w": a}, {"w": a}).differences == []
    (item,) = compare(tmp_path, "model.bin", {"w": a}, {"w": b}).differences
    assert (item.name, item.elements, item.largest) == ("w", 1, 1.0)


def test_a_ckpt_file_that_is_torchs_is_read_as_one(tmp_path: Path) -> None:
    found = compare(tmp_path, "epoch=1-step=4.ckpt", {"w": torch.ones(2)}, {"w": torch.zeros(2)})
    assert [(item.role, item.name) for item in found.differences] == [("epoch=1-step=4.ckpt", "w")]


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    found = compare(tmp_path, "training_args.bin", Evil(tmp_path / "ran"), Evil(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()
    assert found.differences == []
    assert "weights_only=True" in found.skipped["training_args.bin"]
    assert "mkdir" in found.skipped["training_args.bin"]


def test_arrays_of_python_objects_are_refused(tmp_path: Path) -> None:
    array = np.array([Evil(tmp_path / "ran")], dtype=object)
    found = compare(tmp_path, "state.pt", {"x": array}, {"x": array})
    assert not (tmp_path / "ran").exists()
    assert "state.pt" in found.skipped
