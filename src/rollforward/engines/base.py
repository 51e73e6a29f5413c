"""The interface between a run and a framework: what an engine's package offers, and how it is found.

A package is an entry point of the group `rollforward.engines`, so engines can be installed beside this
program. In the `pyproject.toml` of one:

    [project.entry-points."rollforward.engines"]
    mine = "my_engine.package:MyPackage"

`context.engine: mine` in a run's configuration then selects it. The class is called without arguments.
The computing is behind `grpo.ports.Engine`; this is everything else that differs between frameworks.
Importing a package loads no framework: only `connect`, `create` and `serve_scheduler` may.
"""

import difflib
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol

from rollforward.errors import ConfigError
from rollforward.grpo.ports import Engine, Group, Meeting
from rollforward.grpo.types import EngineSettings, LoraSettings
from rollforward.models.memory import Memory
from rollforward.tensors import Layout, TensorSpec

GROUP = "rollforward.engines"
DEFAULT = "mindspore"


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process among those of a run."""

    role: Literal["alone", "worker", "scheduler"]
    rank: int
    """-1 for a scheduler."""
    world_size: int


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How several workers are started on this machine, by a launcher in a process of its own.

    The launcher writes a log for each worker into the log folder that `EnginePackage.launch` was given.
    """

    name: str
    """Of the launcher, for people."""
    command: Sequence[str]
    """What to run; the script that each worker runs and its arguments are appended."""
    environment: Mapping[str, str]
    """The launcher's."""
    own_log: str
    """File name for the launcher's own output."""
    worker_log: str
    """File name of a worker's log; `{rank}` stands for its rank, in `glob` patterns for any."""
    see_also: str = ""
    """Another log of the launcher that may say why it ended."""
    noise: re.Pattern[str] | None = None
    """Matches the beginning of the framework's own log lines: not shown, but kept in the logs."""

    def log_of(self, folder: Path, rank: int | None) -> Path:
        """Where a worker's output is; the launcher's own for None."""
        return folder / (self.own_log if rank is None else self.worker_log.format(rank=rank))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check of `rollforward doctor` found."""

    check: str
    level: Literal["ok", "note", "problem"]
    """A note is worth knowing but is not a failure."""
    text: str
    hint: str = ""


class EnginePackage(Protocol):
    """What a run needs from a framework besides the engine itself."""

    def missing(self) -> str | None:
        """What to install before this engine can compute here, as an argument for pip; None: nothing."""
        ...

    # About a model, before anything slow is loaded.

    def vocab_size(self, model_config: Mapping[str, Any]) -> int:
        """Ids that the model has; ModelError when the engine does not support this model."""
        ...

    def tensor_layout(self, model_config: Mapping[str, Any], lora: LoraSettings | None = None) -> Layout:
        """`Engine.layout()` of such a model, before there is an engine.

        ConfigError for adapters (`lora`), where the engine has none.
        """
        ...

    def memory_needed(self, settings: EngineSettings, workers: int) -> Memory | None:
        """What each of so many workers will need, before there is an engine; None: not known.

        They make whole groups, where the model is cut (`EngineSettings.model_parallel`).
        """
        ...

    def check_model_parallel(self, model_config: Mapping[str, Any], workers: int) -> None:
        """ModelError, with the numbers that work, unless such a model can be cut over so many workers.

        Those of a group then have a `ports.Teams` to talk to each other, and `EngineSettings.model_parallel`.
        """
        ...

    def versions(self) -> Mapping[str, str]:
        """Package -> version of what computes: exact repetition is promised on the same versions only."""
        ...

    def sources(self) -> Sequence[Path]:
        """The engine's own source files: changed code is another version, even under the same number."""
        ...

    def arithmetic_variables(self) -> Sequence[str]:
        """Environment variables that change bits of the results; a resume names those that changed."""
        ...

    # About the processes of a run.

    def this_process(self, environment: Mapping[str, str]) -> Process:
        """What the launcher's variables say about this process; alone when no launcher started it."""
        ...

    def launched(self, environment: Mapping[str, str]) -> str:
        """The name of the launcher that started this process, for one worker or many; "" for none."""
        ...

    def launch(self, workers: int, log_folder: Path, environment: Mapping[str, str]) -> Launch:
        """How to start this many workers on this machine."""
        ...

    def prepare(self, environment: MutableMapping[str, str], *, patience: float) -> None:
        """Set the variables that the framework reads on import.

        `patience`: seconds after which a run gives up on a collective by itself, naming the late
        workers; the framework must wait longer. 0: forever.
        """
        ...

    def examine(self, environment: Mapping[str, str]) -> list[Finding]:
        """The checks that `rollforward doctor` makes of this framework's environment."""
        ...

    # Computing: these load the framework.

    def connect(self, device_target: str, meeting: Meeting) -> Group:
        """The workers that this process belongs to. Collective; so is all within `meeting`."""
        ...

    def lost_contact(self) -> bool:
        """Whether the framework has given up the group, as it may when a worker does not answer."""
        ...

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        """The engine, with the weights of the folders that the settings name."""
        ...

    def strategy_file(self, layout: Mapping[str, TensorSpec], world_size: int) -> bytes | None:
        """`strategy_<rank>.ckpt` for what a worker holds, name -> spec; None: the framework has none.

        Neighbouring workers hold equal parts of a tensor, cut along one axis, or each holds all of it.
        """
        ...

    def serve_scheduler(self, device_target: str) -> None:
        """Bring the workers together, as the process that a launcher starts for it, until they are done."""
        ...


def names() -> list[str]:
    """The engines that are installed."""
    return sorted(entry_points(group=GROUP).names)


def find_engine(name: str) -> EnginePackage:
    """The package of an engine; ConfigError, naming the nearest, when there is none with that name."""
    for entry in entry_points(group=GROUP, name=name):
        package: EnginePackage = entry.load()()
        return package
    there = names()
    near = difflib.get_close_matches(name, there, n=1)
    raise ConfigError(
        f"context.engine: no engine {name!r} is installed; there is {', '.join(there) or 'none'}",
        hint=f"did you mean {near[0]}?" if near else f"install the package that provides it ({GROUP})",
    )


def require(package: EnginePackage) -> EnginePackage:
    """The package, if it can compute here; otherwise ConfigError, which says what to install."""
    missing = package.missing()
    if missing is not None:
        raise ConfigError(f"training needs more than is installed: {missing}")
    return package
