"""The engine of a run, imported when it is needed: the only door between `run` and a framework.

`vocab_size` and `tensor_layout` are asked before anything slow is loaded; all else loads the framework.
"""

import sys
from collections.abc import Mapping
from typing import Any, Protocol

from rollforward.grpo.ports import Engine, Group, Meeting, Tensors
from rollforward.grpo.types import EngineSettings


class EnginePackage(Protocol):
    """What a run needs of an engine besides the engine itself."""

    def vocab_size(self, model_config: Mapping[str, Any]) -> int:
        """Ids that the model has; ModelError when the engine cannot be this model. Loads no framework."""
        ...

    def tensor_layout(self, model_config: Mapping[str, Any]) -> Tensors:
        """`Engine.tensors()` of such a model in dtype and shape, without its memory. Loads no framework."""
        ...

    def connect(self, device_target: str, meeting: Meeting) -> Group:
        """The workers that this process belongs to. Collective; so is all within `meeting`."""
        ...

    def lost_contact(self) -> bool:
        """Whether the framework has given the group up, as it may when a worker does not answer."""
        ...

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        """The engine, with the weights of the folders that the settings name."""
        ...

    def strategy_file(self, shapes: Mapping[str, tuple[int, ...]], world_size: int) -> bytes | None:
        """`strategy_<rank>.ckpt` for tensors that every worker holds whole; None: the framework has none."""
        ...

    def serve_scheduler(self, device_target: str) -> None:
        """Bring the workers together, as the process that `msrun` starts for it, until they are done."""
        ...


class MindSpore:
    """`rollforward.engines.mindspore`."""

    def vocab_size(self, model_config: Mapping[str, Any]) -> int:
        """See `EnginePackage.vocab_size`."""
        from rollforward.models.config import ModelConfig

        return ModelConfig.parse(model_config).vocab_size

    def tensor_layout(self, model_config: Mapping[str, Any]) -> Tensors:
        """See `EnginePackage.tensor_layout`."""
        from rollforward.models.config import ModelConfig
        from rollforward.models.shapes import tensor_layout

        return tensor_layout(ModelConfig.parse(model_config))

    def connect(self, device_target: str, meeting: Meeting) -> Group:
        """See `EnginePackage.connect`."""
        from rollforward.engines.mindspore.parallel import connect

        return connect(device_target, meeting)

    def lost_contact(self) -> bool:
        """See `EnginePackage.lost_contact`."""
        if "mindspore" not in sys.modules:
            return False
        from rollforward.engines.mindspore.parallel import lost_contact

        return lost_contact()

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        """See `EnginePackage.create`."""
        from rollforward.engines.mindspore.engine import create

        return create(settings, group)

    def strategy_file(self, shapes: Mapping[str, tuple[int, ...]], world_size: int) -> bytes | None:
        """See `EnginePackage.strategy_file`."""
        from rollforward.engines.mindspore.strategy_format import strategy_file

        return strategy_file(shapes, world_size)

    def serve_scheduler(self, device_target: str) -> None:
        """See `EnginePackage.serve_scheduler`."""
        from rollforward.engines.mindspore.parallel import serve_scheduler

        serve_scheduler(device_target)
