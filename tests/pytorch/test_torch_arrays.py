"""Tensors, optimizers, random state and plain values survive the way to a checkpoint and back, to the bit."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rollforward
from rollforward.errors import InputError
from rollforward.torch import (
    HostCopies,
    as_array,
    as_tensor,
    load_optimizer,
    optimizer_groups,
    optimizer_tensors,
    plain,
    put_back,
    random_state,
    set_random_state,
)

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)])
def test_a_tensor_comes_back_with_its_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    back = as_tensor(as_array(tensor))
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert back.flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist()


def test_memory_is_shared_where_it_can_be() -> None:
    tensor = torch.zeros(4, 3)
    as_array(tensor)[1, 2] = 5
    assert tensor[1, 2] == 5
    as_array(tensor.T)[0, 0] = 7
    assert tensor[0, 0] == 0, "of a transposed tensor it is a copy"


def test_what_was_read_into_a_copy_is_put_back() -> None:
    tensors = {"whole": torch.zeros(3, 2), "transposed": torch.zeros(3, 2).T}
    arrays = HostCopies().arrays(tensors)
    for array in arrays.values():
        array[...] = 9
    put_back(tensors, arrays)
    assert all((tensor == 9).all() for tensor in tensors.values())


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "adam amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "sgd momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1, momentum=0.5),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.1),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.1),
}


def model_with(make: Any) -> tuple[torch.nn.Module, Any, dict[int, str]]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    groups = [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[1].parameters()}]
    return model, make(groups), {id(each): name for name, each in model.named_parameters()}


def steps(model: torch.nn.Module, optimizer: Any, numbers: range) -> None:
    for number in numbers:
        torch.manual_seed(number)
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 1, 4])
def test_an_optimizer_continues_with_the_same_bits(name: str, before: int) -> None:
    model, optimizer, names = model_with(OPTIMIZERS[name])
    steps(model, optimizer, range(before))
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    arrays = {key: np.array(as_array(each)) for key, each in optimizer_tensors(optimizer, names).items()}
    groups = plain.parse(plain.dump(optimizer_groups(optimizer, names)))
    steps(model, optimizer, range(before, before + 3))

    other, resumed, own = model_with(OPTIMIZERS[name])
    other.load_state_dict(weights)
    load_optimizer(resumed, own, arrays, groups)
    steps(other, resumed, range(before, before + 3))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key])


def test_an_optimizer_of_another_model_is_refused() -> None:
    _, optimizer, names = model_with(OPTIMIZERS["adamw"])
    groups = optimizer_groups(optimizer, names)
    other = torch.nn.Linear(2, 2)
    theirs = torch.optim.AdamW(other.parameters())
    with pytest.raises(InputError, match="groups of"):
        load_optimizer(theirs, {id(each): name for name, each in other.named_parameters()}, {}, groups)
    with pytest.raises(InputError, match="does not have"):
        optimizer_groups(theirs, names)


def test_state_that_cannot_be_saved_is_named() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(model.parameters())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(torch.ones(1, 2)).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with pytest.raises(InputError, match="LBFGS keeps a"):
        optimizer_tensors(optimizer, {id(each): name for name, each in model.named_parameters()})


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 3))
def test_all_generators_continue(seed: int, normals: int, uniforms: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

    def draw() -> list[float]:
        drawn = [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()]
        return [*drawn, *torch.randn(3).tolist(), float(torch.randint(1000, ()).item())]

    for _ in range(normals):
        random.gauss(0, 1)
        np.random.randn()
    for _ in range(uniforms):
        torch.rand(1)
    state = {name: array.copy() for name, array in random_state().items()}
    expected = draw()
    set_random_state(state)
    assert draw() == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.sampled_from(["tuple", "items", "float", "counter"]), inner)
        | st.dictionaries(st.integers(), inner)
    ),
    max_leaves=12,
)


@given(values)
def test_plain_values_come_back(value: Any) -> None:
    assert repr(plain.parse(plain.dump(value))) == repr(value)


def test_a_scheduler_of_milestones_comes_back() -> None:
    """Its milestones are a Counter of whole numbers, which JSON would turn into text."""
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    state = plain.parse(plain.dump(scheduler.state_dict()))
    assert state == scheduler.state_dict()
    assert isinstance(state["milestones"], Counter)


def test_what_needs_pickle_is_named() -> None:
    with pytest.raises(TypeError, match=r"\['a'\]\[0\] is a object"):
        plain.dump({"a": [object()]})


def test_a_loop_of_a_module_and_an_optimizer_resumes(tmp_path: Path) -> None:
    def train(steps_until: int) -> list[float]:
        model, optimizer, names = model_with(OPTIMIZERS["adamw"])
        copies = HostCopies()
        policy = copies.arrays(model.state_dict())
        with rollforward.open_run(tmp_path) as run:
            start = run.restore({"policy_model": policy}, free=("optimizer",))
            put_back(model.state_dict(), policy)
            if start and start.free:
                load_optimizer(optimizer, names, start.free["optimizer"], start.state["groups"])
            for step in range(start.step if start else 0, steps_until):
                with run.updating(step):
                    steps(model, optimizer, range(step, step + 1))
                run.outcome(step, sum=float(policy["0.weight"].sum()))
                moments = copies.arrays(optimizer_tensors(optimizer, names))
                state = {"groups": optimizer_groups(optimizer, names)}
                tensors = {"policy_model": policy, "optimizer": moments}
                run.checkpoint(step + 1, tensors, every=2, state=state)
        return model[1].weight.flatten().tolist()

    train(3)
    resumed = train(7)
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert train(7) == resumed
