"""What TRL's trainer needs to continue besides its tensors, as arrays of two free roles.

Of every process, as `RANK/...`, since each has its own, in the role `trainer`:

    random/NAME     the state of its random generators
    buffer/I/NAME   a tensor of the rollouts that it still has to train on, when a checkpoint falls between
                    two generations (`num_iterations`, `steps_per_generation`): part I of them
    rest            uint8: the number of forward passes, what was not logged yet, what else is in the buffer
                    (`rollforward.torch.plain`)

Of the first process only, since it is the same on all:

    state           uint8: transformers' `trainer_state.json`
    schedule        uint8: learning rate scheduler, groups of the optimizer, loss scaler, what was logged last

Figures of the clock are other ones in each run, however exact it is, so they are apart, in the role `clock`:

    RANK/clock      uint8: seconds of training, and the `step_time`s of what was logged
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers.trainer_callback import ExportableState

from rollforward.tensors import Tensors
from rollforward.torch import gather_arrays, optimizer_groups, random_state
from rollforward.torch.arrays import Arrays
from rollforward.trl.generation import (
    as_bytes,
    as_lists,
    empty_logs,
    extend_logs,
    from_bytes,
    joined,
    split,
    under,
)

TRAINER, CLOCK = "trainer", "clock"
_OF_THE_CLOCK = ("time", "per_second")
"""Parts of the names of such figures."""
_STEPS = ("logging_steps", "eval_steps", "save_steps")
"""What a resumed run takes from its arguments, not from the checkpoint, where they are whole numbers."""


def own_progress(trainer: Any, seconds: float) -> Arrays:
    """This process's part; `seconds` were spent on training so far."""
    generated_every = trainer.args.steps_per_generation * trainer.num_iterations
    buffer = trainer._buffered_inputs if trainer._step % generated_every else None
    arrays: Arrays = {f"random/{name}": array for name, array in random_state().items()}
    others = []
    for number, values in enumerate(buffer or ()):
        tensors, rest = split(values)
        arrays |= {f"buffer/{number}/{name}": array for name, array in tensors.items()}
        others.append(rest)
    metrics = {mode: _without_clock(values) for mode, values in trainer._metrics.items()}
    rest = {
        "step": trainer._step,
        "buffer": others,
        "metrics": metrics,
        "loss": trainer._tr_loss.item(),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "first_step": trainer._initial_global_step,
        "entropy": [trainer.entropy_coef, trainer._last_world_entropy],
    }
    clock = {
        "seconds": seconds,
        "metrics": {mode: _of_the_clock(values) for mode, values in trainer._metrics.items()},
        "history": [_of_the_clock(row) for row in trainer.state.log_history],
    }
    return {**arrays, "rest": as_bytes(rest), CLOCK: as_bytes(clock)}


def shared_progress(trainer: Any, names: Mapping[int, str], best_step: int | None) -> Arrays:
    """What is the same on all processes; `names` of the parameters, by their `id`."""
    state = dataclasses.asdict(trainer.state) | {
        "stateful_callbacks": _callback_states(trainer),
        # Transformers looks for a folder of this name; the best checkpoint is found by its step.
        "best_model_checkpoint": None,
        "log_history": [_without_clock(row) for row in trainer.state.log_history],
    }
    scaler = trainer.accelerator.scaler
    schedule = {
        "scheduler": trainer.lr_scheduler.state_dict(),
        "optimizer": optimizer_name(trainer),
        "groups": optimizer_groups(trainer.optimizer, names),
        "scaler": None if scaler is None else scaler.state_dict(),
        "logs": as_lists(trainer._logs),
        "best_step": best_step,
    }
    return {"state": _as_json(state), "schedule": as_bytes(schedule)}


def optimizer_name(trainer: Any) -> str:
    """The class of the optimizer that accelerate has wrapped."""
    return type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__


def gathered(
    trainer: Any, names: Mapping[int, str], *, seconds: float, best_step: int | None
) -> dict[str, Arrays]:
    """Both roles, the same on all processes. Collective."""
    own = own_progress(trainer, seconds)
    if trainer.accelerator.process_index == 0:
        own |= shared_progress(trainer, names, best_step)
    found: dict[str, Arrays] = {TRAINER: {}, CLOCK: {}}
    for rank, arrays in enumerate(gather_arrays(own)):
        for name, array in arrays.items():
            found[CLOCK if name == CLOCK else TRAINER][f"{rank}/{name}"] = array
    return found


class Progress:
    """Both roles of a checkpoint, as one process sees them."""

    def __init__(self, roles: Tensors, rank: int) -> None:
        self._own = under(roles[TRAINER], str(rank))
        shared = under(roles[TRAINER], "0")
        self._rest = from_bytes(self._own["rest"])
        self._clock = from_bytes(roles[CLOCK][f"{rank}/{CLOCK}"])
        self._schedule = from_bytes(shared["schedule"])
        self._state: dict[str, Any] = json.loads(shared["state"].tobytes())

    @property
    def seconds(self) -> float:
        """How long had been trained by then."""
        return float(self._clock["seconds"])

    @property
    def random(self) -> Arrays:
        """The state of the random generators."""
        return under(self._own, "random")

    def was_stopped(self, max_steps: int) -> bool:
        """Whether a callback had ended training early; not if the last step is another one now."""
        control = self._state["stateful_callbacks"]["TrainerControl"]["args"]
        short = self._state["global_step"] < self._state["max_steps"] == max_steps
        return bool(control["should_training_stop"] and short)

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler's state."""
        found: dict[str, Any] = self._schedule["scheduler"]
        return found

    @property
    def scaler(self) -> dict[str, Any] | None:
        """The loss scaler's state; None without FP16."""
        found: dict[str, Any] | None = self._schedule["scaler"]
        return found

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the best policy so far."""
        found: int | None = self._schedule["best_step"]
        return found

    @property
    def optimizer(self) -> str:
        """The class of the optimizer."""
        return str(self._schedule["optimizer"])

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        found: list[dict[str, Any]] = self._schedule["groups"]
        return found

    def trainer_state(self, args: Any = None) -> bytes:
        """`trainer_state.json`, for a trainer with these arguments, which may save and log at other steps."""
        given = {name: getattr(args, name, None) for name in _STEPS}
        whole = {name: int(steps) for name, steps in given.items() if steps is not None and steps >= 1}
        history = zip(self._state["log_history"], self._clock["history"], strict=True)
        return json.dumps(
            self._state | whole | {"log_history": [row | times for row, times in history]}
        ).encode()

    def load_callbacks(self, trainer: Any) -> None:
        """The counters of callbacks such as early stopping: those of the same class, in their order."""
        for name, states in self._state["stateful_callbacks"].items():
            callbacks = [each for each in _stateful(trainer) if type(each).__name__ == name]
            listed = states if isinstance(states, list) else [states]
            for callback, state in zip(callbacks, listed, strict=False):
                for attribute, value in state["attributes"].items():
                    setattr(callback, attribute, value)

    def load_rest(self, trainer: Any) -> None:
        """What transformers sets to its beginnings when training begins."""
        rest, device = self._rest, trainer.accelerator.device
        trainer._step = rest["step"]
        trainer._tr_loss.fill_(rest["loss"])
        trainer._total_loss_scalar = rest["total_loss"]
        trainer._globalstep_last_logged = rest["last_logged"]
        trainer._initial_global_step = rest["first_step"]
        trainer.entropy_coef, trainer._last_world_entropy = rest["entropy"]
        trainer._metrics = {
            mode: defaultdict(list, values | self._clock["metrics"][mode])
            for mode, values in rest["metrics"].items()
        }
        trainer._logs = empty_logs(trainer.args.generation_batch_size)
        extend_logs(trainer._logs, self._schedule["logs"])
        parts = [
            joined(under(self._own, f"buffer/{number}"), others, device)
            for number, others in enumerate(rest["buffer"])
        ]
        trainer._buffered_inputs = parts or None


def _stateful(trainer: Any) -> list[Any]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, ExportableState)]


def _callback_states(trainer: Any) -> dict[str, Any]:
    """As transformers writes them: a list where several callbacks are of one class."""
    found: dict[str, list[Any]] = {}
    for callback in [*_stateful(trainer), trainer.control]:
        found.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: states[0] if len(states) == 1 else states for name, states in found.items()}


def _of_the_clock(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if any(part in name for part in _OF_THE_CLOCK)}


def _without_clock(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name not in _of_the_clock(figures)}


def _as_json(value: Any) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)
