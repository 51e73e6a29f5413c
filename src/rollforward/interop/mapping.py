"""Another trainer's tensors matched with a model: under our names, every one accounted for.

Each tensor in a file has its place in the model, or is left out on purpose (a trainer's counters and
monitored values, and the parameters that an optimizer's file repeats), or is a problem. This needs only
the headers, so it can be decided before any tensor is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.errors import CheckpointInvalid
from rollforward.interop.names import Heads, is_bookkeeping, is_concatenated, to_ours
from rollforward.tensors import Layout, TensorSpec

_SECOND = "adam_v."
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class MappedTensors:
    """What a role's file holds for the model."""

    tensors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Under our names."""
    problems: tuple[str, ...] = ()
    """A line for each tensor that does not fit."""
    left_out: tuple[str, ...] = ()
    """What is not needed: the last parts of the names."""
    concatenated: bool = False
    """Whether concatenated projections had to be split."""


def fit(role: str, arrays: Mapping[str, NDArray[Any]], wanted: Layout, groups: int) -> MappedTensors:
    """The tensors in a role's file under our names and in our dtypes; none when there are problems.

    `wanted` is the layout of the model that they must fit, `groups` its number of key-value heads.
    CheckpointInvalid when a tensor holds NaN or infinity, or a second moment is negative: the file is
    damaged.
    """
    named = assign(role, arrays, wanted, groups)
    if named.problems:
        return replace(named, tensors={})
    own = wanted[role]
    return replace(named, tensors={n: _converted(n, array, own[n]) for n, array in named.tensors.items()})


def assign(role: str, arrays: Mapping[str, NDArray[Any]], wanted: Layout, groups: int) -> MappedTensors:
    """`fit` by dtype and shape alone: the arrays are returned as they are, whatever their values."""
    own = wanted[role]
    found = {name: array for name, array in arrays.items() if name in own}
    extra = [n for n, a in arrays.items() if n not in own and (is_bookkeeping(n) or a.dtype.kind == "U")]
    rest = {name: array for name, array in arrays.items() if name not in own and name not in extra}
    if "global_step" in found:
        rest["global_step"] = found.pop("global_step")  # what it counts depends on whose optimizer wrote it
    try:
        mapped = to_ours(rest, _heads(wanted["policy_model"], groups))
    except ValueError as error:
        return MappedTensors(problems=(str(error),))
    twice = sorted(found.keys() & mapped.tensors.keys())
    problems = [f"two tensors lead to {name}" for name in twice]
    left = {name: rest[name] for name in mapped.unmapped}
    for name, array in mapped.tensors.items():
        (found if name in own else left)[name] = array
    problems += _left_over(role, left, found, wanted, mapped.origins)
    problems += [f"there is no {name}" for name in sorted(own.keys() - found.keys())]
    misfits = ((name, _misfit(found[name], own[name])) for name in sorted(own.keys() & found.keys()))
    problems += [f"{name} {misfit}" for name, misfit in misfits if misfit]
    left_out = tuple(sorted({name.rpartition(".")[2] for name in extra}))
    return MappedTensors(found, tuple(problems), left_out, any(map(is_concatenated, arrays)))


def _left_over(
    role: str,
    left: Mapping[str, NDArray[Any]],
    found: Mapping[str, NDArray[Any]],
    wanted: Layout,
    origins: Mapping[str, str],
) -> list[str]:
    """A line for each tensor that the model has no place for, except those that add nothing new."""
    problems = []
    for name, array in sorted(left.items()):
        if role == "optimizer" and name in {*wanted["policy_model"], _HEAD}:
            continue  # MindSpore saves the parameters that an optimizer trains along with it
        if role == "policy_model" and name in wanted["optimizer"]:
            continue  # and MindFormers saves all of a trainer in one file
        if name == _HEAD and _EMBEDDING in found:
            if not np.array_equal(array, found[_EMBEDDING]):
                problems.append(f"{name} differs from {_EMBEDDING}, but config.json ties them")
        else:
            problems.append(f"{origins.get(name, name)} has no counterpart in the model")
    return problems


def _misfit(array: NDArray[Any], like: TensorSpec) -> str:
    """Why an array cannot take the place of a tensor without loss; empty when it can."""
    if array.shape != like.shape and not array.size == like.size == 1:
        part = array.ndim == len(like.shape) and all(
            0 < have <= want and want % have == 0 for have, want in zip(array.shape, like.shape, strict=True)
        )
        return f"has shape {list(array.shape)}, {'a part of' if part else 'instead of'} {list(like.shape)}"
    if array.dtype.kind != like.dtype.kind or not np.can_cast(array.dtype, like.dtype, "safe"):
        return f"is {array.dtype}, which {like.dtype} cannot hold without loss"
    return ""


def _converted(name: str, array: NDArray[Any], like: TensorSpec) -> NDArray[Any]:
    """In the shape and dtype of `like`."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CheckpointInvalid(f"{name} holds NaN or infinity")
    if name.startswith(_SECOND) and bool((array < 0).any()):
        # It is a mean of squares: its square root would make the weights NaN at the first update.
        raise CheckpointInvalid(f"{name} holds negative values")
    return np.ascontiguousarray(array.reshape(like.shape), dtype=like.dtype)


def _heads(policy: Mapping[str, TensorSpec], groups: int) -> Heads:
    """How a concatenated projection is laid out, from the model's separate projections."""

    def rows(kind: str) -> int:
        return next((s.shape[0] for name, s in policy.items() if name.endswith(f".{kind}_proj.weight")), 0)

    return Heads(query_rows=rows("q"), key_rows=rows("k"), groups=groups)
