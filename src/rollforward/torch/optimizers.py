"""An optimizer's state as a role: parameter and key -> array, such as `layers.0.weight exp_avg`.

PyTorch's optimizers make their state in the first step, so the role is a free one (`Run.restore`): empty
before that. What is not a tensor (learning rates, betas) is in the groups, plain values.
"""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray

from rollforward.errors import InputError
from rollforward.torch.arrays import as_tensor

_NUMBER = "number"
"""Marks state that is a Python number: an array of no dimensions would come back as a tensor."""


def optimizer_tensors(optimizer: Any, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """The state of each parameter: the optimizer's own tensors.

    `names`: `id` of a parameter -> its name. InputError for state that is neither a tensor nor a number.
    """
    found: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        name = _name(names, parameter)
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                found[f"{name} {key}"] = value
            elif isinstance(value, int | float):
                found[f"{name} {key} {_NUMBER}"] = torch.tensor(value, dtype=torch.float64)
            elif value is not None:
                raise InputError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} for {name} as {key!r}",
                    hint="only optimizers whose state is tensors and numbers can be saved",
                )
    return found


def optimizer_groups(optimizer: Any, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """The parameter groups, with the names of their parameters instead of these."""
    return [
        {**group, "params": [_name(names, parameter) for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


def load_optimizer(
    optimizer: Any,
    names: Mapping[int, str],
    arrays: Mapping[str, NDArray[Any]],
    groups: list[dict[str, Any]],
) -> None:
    """Give an optimizer the state that `optimizer_tensors` and `optimizer_groups` took from another.

    The optimizer may use the arrays' memory from now on. InputError when its groups have other parameters.
    """
    own = [[_name(names, parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    theirs = [group["params"] for group in groups]
    if own != theirs:
        raise InputError(
            f"the optimizer has {len(own)} groups of {[len(group) for group in own]} parameters; the "
            f"checkpoint has {len(theirs)} of {[len(group) for group in theirs]}, or with other names",
            hint="resume with the model and the optimizer that the run was started with",
        )
    optimizer.load_state_dict(optimizer_state_dict(arrays, groups))


def optimizer_state_dict(arrays: Mapping[str, NDArray[Any]], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What `Optimizer.state_dict` gives, over the arrays' memory."""
    numbers = {
        name: number for number, name in enumerate(name for group in groups for name in group["params"])
    }
    state: dict[int, dict[str, Any]] = {}
    for path, array in arrays.items():
        name, key, *number = path.split(" ")
        state.setdefault(numbers[name], {})[key] = float(array) if number else as_tensor(array)
    packed = [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups]
    return {"state": state, "param_groups": packed}


def _name(names: Mapping[int, str], parameter: torch.Tensor) -> str:
    found = names.get(id(parameter))
    if found is None:
        raise InputError(
            f"the optimizer has a parameter of shape {list(parameter.shape)} that the model does not have",
            hint="make the optimizer from the parameters of the model that is trained",
        )
    return found
