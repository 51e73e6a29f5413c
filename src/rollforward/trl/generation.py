"""What one call of `_generate_and_score_completions` gives and does, as a record that can stand in for it.

    output/NAME     a tensor of what it returns: tokens, masks, advantages, log-probabilities
    random/NAME     the state of the random generators after it
    rest            uint8: what it returns besides tensors, the metrics and completions that it logged, and
                    how many tokens were seen by then (`rollforward.torch.plain`)

The texts and rewards of this process's completions go along as JSON, for people.
"""

import json
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rollforward.torch import as_array, as_tensor, plain, random_state, set_random_state
from rollforward.torch.arrays import Arrays

NESTED = ("rewards", "extra")
"""The logs that have a column for each reward function, or for each name."""
_REST = "rest"


@dataclass
class Logged:
    """What a call added to the trainer's metrics and logs."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    logs: dict[str, Any] = field(default_factory=dict)
    tokens_seen: float = 0


@contextmanager
def collecting(trainer: Any, mode: str) -> Iterator[Logged]:
    """Collect what is logged in the block; the trainer's own metrics and logs are as before afterwards."""
    logged = Logged()
    metrics, logs = trainer._metrics[mode], trainer._logs
    trainer._metrics[mode], trainer._logs = defaultdict(list), empty_logs(trainer.args.generation_batch_size)
    try:
        yield logged
        logged.metrics = dict(trainer._metrics[mode])
        logged.logs = as_lists(trainer._logs)
        logged.tokens_seen = trainer.state.num_input_tokens_seen
    finally:
        trainer._metrics[mode], trainer._logs = metrics, logs


def add(trainer: Any, mode: str, logged: Logged) -> None:
    """Do to the trainer what the call did that `logged` was collected from."""
    for name, values in logged.metrics.items():
        if name == "num_tokens":
            # The only one that TRL sets and does not add to: a running total.
            trainer._metrics[mode][name] = list(values)
        else:
            trainer._metrics[mode][name].extend(values)
    extend_logs(trainer._logs, logged.logs)
    trainer.state.num_input_tokens_seen = logged.tokens_seen


def empty_logs(size: int) -> dict[str, Any]:
    """`GRPOTrainer._logs` as its constructor makes them."""
    return {
        "images": deque(maxlen=size),
        "prompt": deque(maxlen=size),
        "completion": deque(maxlen=size),
        "rewards": defaultdict(lambda: deque(maxlen=size)),
        "advantages": deque(maxlen=size),
        "extra": defaultdict(lambda: deque(maxlen=size)),
    }


def as_lists(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The logs as plain values. Left out: images. What a reward function logged for show may be anything."""
    return {
        name: {key: list(map(_plain, values)) for key, values in column.items()}
        if name in NESTED
        else list(column)
        for name, column in logs.items()
        if name != "images"
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else str(value)


def extend_logs(logs: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    """Add the columns of `as_lists`."""
    for name, column in added.items():
        if name in NESTED:
            for key, values in column.items():
                logs[name][key].extend(values)
        else:
            logs[name].extend(column)


def pack(output: Mapping[str, Any], logged: Logged, *, main: bool) -> Arrays:
    """The arrays of a record. Only the main process shows the logs, so only it keeps them."""
    arrays, rest = split(output)
    arrays = {f"output/{name}": array for name, array in arrays.items()}
    arrays |= {f"random/{name}": array for name, array in random_state().items()}
    kept = {"output": rest, "metrics": logged.metrics, "tokens_seen": logged.tokens_seen}
    return {**arrays, _REST: as_bytes(kept | ({"logs": logged.logs} if main else {}))}


def unpack(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> tuple[dict[str, Any], Logged]:
    """What `pack` was given; the random generators continue from where they were then."""
    rest = from_bytes(arrays[_REST])
    set_random_state(under(arrays, "random"))
    output = joined(under(arrays, "output"), rest["output"], device)
    logged = Logged(rest["metrics"], rest.get("logs", {}), rest["tokens_seen"])
    return output, logged


def texts(
    output: Mapping[str, Any], logged: Logged, process: int, processes: int, ends: Collection[int]
) -> dict[str, Any]:
    """This process's completions as JSON, in the form that `rollforward rollouts` shows.

    `ends`: the tokens that end a completion.
    """
    ids, mask = output["completion_ids"], output["completion_mask"]
    if len(logged.logs["prompt"]) != len(ids) * processes:
        return {}
    own = slice(process * len(ids), (process + 1) * len(ids))
    told = {
        "tokens": mask.sum(dim=1).tolist(),
        "stopped": torch.isin(ids, torch.tensor(list(ends), device=ids.device)).any(dim=1).tolist(),
        "prompts": logged.logs["prompt"][own],
        "completions": logged.logs["completion"][own],
        "rewards": {name: _finite(values[own]) for name, values in logged.logs["rewards"].items()},
        "advantages": _finite(logged.logs["advantages"][own]),
    }
    found: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return found


def _finite(values: list[float]) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values]


def split(values: Mapping[str, Any]) -> tuple[Arrays, Any]:
    """The tensors among values as arrays, and all the others; the order of names is with the others."""
    arrays = {name: as_array(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return arrays, {name: None if name in arrays else [value] for name, value in values.items()}


def joined(arrays: Mapping[str, NDArray[Any]], rest: Any, device: torch.device) -> dict[str, Any]:
    """The inverse of `split`, with the tensors on a device."""
    return {
        name: as_tensor(arrays[name], device) if value is None else value[0] for name, value in rest.items()
    }


def under(arrays: Mapping[str, NDArray[Any]], folder: str) -> Arrays:
    """The arrays whose names begin with `folder/`, by the rest of their names."""
    begin = f"{folder}/"
    return {name.removeprefix(begin): array for name, array in arrays.items() if name.startswith(begin)}


def as_bytes(value: Any) -> NDArray[np.uint8]:
    """A plain value as an array."""
    return np.frombuffer(plain.dump(value), np.uint8)


def from_bytes(array: NDArray[Any]) -> Any:
    """The value of `as_bytes`."""
    return plain.parse(array.tobytes())
