"""Groups of workers: of a run that has one process, and of the replicas of a model."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rollforward.errors import EngineError
from rollforward.grpo.ports import Group


class OneProcess:
    """`grpo.ports.Group` of one."""

    rank: int = 0
    world_size: int = 1

    def all_gather(self, value: Any) -> list[Any]:
        """The value, passed through JSON, so that one process sees what each of many would."""
        return [json.loads(encoded(value))]

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Nothing to wait for."""
        yield


def encoded(value: Any) -> bytes:
    """What processes send each other: the value as JSON. EngineError when JSON cannot hold it."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=True).encode()
    except (TypeError, ValueError) as error:
        raise EngineError(f"workers exchange JSON values, and this is not one: {error}") from error


class Replicas:
    """The workers that hold the same part of the model, as a `Group`: those that share the chunks of a step.

    A model that is cut over M workers is held by neighbours, ranks r * M to r * M + M - 1: replica r. They
    compute the same chunks, so each says the same. `all_gather` is collective for all workers nevertheless.
    """

    def __init__(self, everyone: Group, model_parallel: int = 1) -> None:
        self.all = everyone
        self.model_parallel = model_parallel
        self.rank, self.shard = divmod(everyone.rank, model_parallel)
        self.world_size = everyone.world_size // model_parallel
        self.workers = range(self.shard, everyone.world_size, model_parallel)
        """Their ranks among all."""

    def all_gather(self, value: Any) -> list[Any]:
        """Each replica's value. EngineError, on all, when the workers of a replica do not say the same."""
        told, size = self.all.all_gather(value), self.model_parallel
        found = [told[first : first + size] for first in range(0, len(told), size)]
        for replica, values in enumerate(found):
            # As text: NaN is not itself.
            if len(set(map(encoded, values))) > 1:
                raise EngineError(
                    f"workers {replica * size} to {replica * size + size - 1} hold a model together and must "
                    "compute the same samples, but their numbers differ",
                    hint="run them on machines of one kind, with the same software; resume with "
                    "--resume_training",
                )
        return [values[0] for values in found]

    def sharing(self) -> AbstractContextManager[None]:
        """That of all workers."""
        return self.all.sharing()
