"""A whole run with the NumPy engine of the conformance suite: little work, every file as in a real one."""

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import toy_engine
from engine_case import SETTINGS
from lockstep import LockStep
from tokenizer_folder import VOCAB, write_tokenizer
from toy_run import Ranks

from rollforward.config import loading as config
from rollforward.data.dataset import RememberedDataset
from rollforward.engines.base import Finding, Launch, Process
from rollforward.errors import ConfigError, EngineError, ModelError
from rollforward.grpo.group import OneProcess
from rollforward.grpo.ports import Engine, Group, Meeting
from rollforward.grpo.types import EngineSettings, LoraSettings, TrainingBatch, UpdateOutcome
from rollforward.position import Position
from rollforward.run.plan import Plan, prepare
from rollforward.run.request import Request
from rollforward.run.session import train
from rollforward.storage import LocalStorage
from rollforward.store import ShadowCheckpoints, find
from rollforward.store.restoring import content_digests
from rollforward.store.saved import Committed
from rollforward.tensors import Layout, TensorSpec


class Killed(BaseException):
    """The process is gone: nothing may catch this."""


@dataclass
class ToyPackage:
    """`engines.base.EnginePackage` over the toy engine: the engine `toy`, by `rollforward_toy-1.dist-info`.

    An update may be the last thing that it does.
    """

    dies_at_update: int | None = None
    group: Callable[[], Group] = OneProcess
    updates: list[float] = field(default_factory=list)
    make: Callable[[EngineSettings, Group], toy_engine.ToyEngine] = toy_engine.create

    def missing(self) -> str | None:
        return None

    def vocab_size(self, model_config: Mapping[str, Any]) -> int:
        if model_config.get("model_type") != "toy":
            raise ModelError(f"config.json: model_type {model_config.get('model_type')!r} is not supported")
        return int(model_config["vocab_size"])

    def tensor_layout(self, model_config: Mapping[str, Any], lora: LoraSettings | None = None) -> Layout:
        if lora is not None:
            raise ConfigError("actor_config.lora: the toy engine has no adapters")
        return toy_engine.create(settings_of(model_config)).layout()

    def check_model_parallel(self, model_config: Mapping[str, Any], workers: int) -> None:
        raise ModelError(f"the toy model {model_config['model_type']} cannot be cut over {workers} workers")

    def memory_needed(self, settings: EngineSettings, workers: int) -> None:
        """Next to nothing."""

    def versions(self) -> Mapping[str, str]:
        return {"toy": "1"}

    def sources(self) -> Sequence[Path]:
        return [Path(toy_engine.__file__)]

    def arithmetic_variables(self) -> Sequence[str]:
        return ["TOY_ARITHMETIC"]

    def this_process(self, environment: Mapping[str, str]) -> Process:  # noqa: ARG002 - as the protocol has it
        return Process(role="alone", rank=0, world_size=1)

    def launched(self, environment: Mapping[str, str]) -> str:  # noqa: ARG002 - as the protocol has it
        return ""

    def launch(self, workers: int, log_folder: Path, environment: Mapping[str, str]) -> Launch:  # noqa: ARG002
        raise EngineError(f"the toy engine has no launcher for {workers} workers")

    def prepare(self, environment: MutableMapping[str, str], *, patience: float) -> None:
        """NumPy reads nothing."""

    def examine(self, environment: Mapping[str, str]) -> list[Finding]:  # noqa: ARG002 - as the protocol has it
        return []

    def connect(self, device_target: str, meeting: Meeting) -> Group:  # noqa: ARG002 - as the protocol has it
        return self.group()

    def lost_contact(self) -> bool:
        return False

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        engine = self.make(settings, group)
        update = engine.update

        def counted(batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
            if len(self.updates) == self.dies_at_update:
                raise Killed
            self.updates.append(learning_rate)
            return update(batch, learning_rate)

        engine.update = counted  # type: ignore[method-assign]
        return engine

    def strategy_file(self, layout: Mapping[str, TensorSpec], world_size: int) -> bytes | None:
        return repr((sorted((name, spec.shape) for name, spec in layout.items()), world_size)).encode()

    def serve_scheduler(self, device_target: str) -> None:
        raise EngineError(f"the toy engine has no scheduler for {device_target}")


def settings_of(model_config: Mapping[str, Any]) -> EngineSettings:
    return replace(SETTINGS, model_config=model_config)


@dataclass
class Place:
    """A folder with a model, a dataset and a configuration; runs go beside them."""

    root: Path

    def __post_init__(self) -> None:
        self.model = write_tokenizer(self.root / "model")
        self.write_model(len(VOCAB))
        self.dataset = self.root / "train.jsonl"
        problems = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(4)]
        self.dataset.write_text("".join(json.dumps(problem) + "\n" for problem in problems))

    def write_model(self, vocab_size: int, model_type: str = "toy") -> None:
        text = json.dumps({"model_type": model_type, "vocab_size": vocab_size})
        (self.model / "config.json").write_text(text)

    def overrides(self, run: str, **changes: Any) -> list[tuple[str, Any]]:
        """Twenty prompts, four to a step: five steps an epoch, two epochs."""
        values = {
            "rl_config.dataset_file": str(self.dataset),
            "rl_config.chunk_size": 2,
            "rl_config.num_rollouts": 2,
            "rl_config.num_generations": 4,
            "rl_config.batch_size": 4,
            "rl_config.epochs": 2,
            "rl_config.save_ckpt_interval": 3,
            "rl_config.save_strategy_dir": str(self.root / "strategy"),
            "actor_config.load": str(self.model),
            "actor_config.save": str(self.root / run),
            "actor_config.lr_schedule.lr": 0.05,
            "generate_config.max_prompt_length": 6,
            "generate_config.sampling_config.max_tokens": 4,
            "reward_config.verifier_function": [f"{__name__}:shortness"],
        }
        return [*values.items(), *((key.replace("__", "."), value) for key, value in changes.items())]

    def plan(
        self,
        run: str,
        *,
        resume: bool = False,
        source: str = "",
        world_size: int = 1,
        rank: int | None = None,
        asked: Mapping[str, Any] | None = None,
        dataset: RememberedDataset | None = None,
        **changes: Any,
    ) -> Plan:
        """What `rollforward train` would do; `asked` is what more the command line asks for."""
        actor = str(self.root / source / "train") if source else ""
        wanted = Request(resume=resume, **{"actor_checkpoint_path": actor, **(asked or {})})
        loaded = config.load(None, self.overrides(run, **changes))
        return prepare(loaded, wanted, ToyPackage(), world_size=world_size, rank=rank, dataset=dataset)

    def train(self, run: str, package: ToyPackage | None = None, **how: Any) -> None:
        """Run it to its end, or to the end of the package."""
        train(self.plan(run, **how), package or ToyPackage())

    def train_by_two(self, run: str, *packages: ToyPackage, **how: Any) -> list[BaseException | None]:
        """The same by two workers, in turn in this process; what each of them died of."""
        return self.train_by(2, run, *packages, **how)

    def train_by(
        self, workers: int, run: str, *packages: ToyPackage, **how: Any
    ) -> list[BaseException | None]:
        """The same by so many workers; without `packages` each gets one of its own."""
        packages = packages or tuple(ToyPackage() for _ in range(workers))

        def work(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
            package = replace(packages[rank], group=lambda: Ranks(rank, workers, exchange))
            train(self.plan(run, world_size=workers, rank=rank, **how), package)

        return LockStep(workers).run(work)

    def digests(self, run: str) -> dict[str, str]:
        """Role -> digest of the newest checkpoint, however its tensors are cut into pieces."""
        storage = LocalStorage(self.root / run)
        return content_digests(storage, find(storage).manifest)


def commit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is committed where it begins, so that a kill finds the same ones on any machine."""
    begin = ShadowCheckpoints.begin

    def begin_and_settle(self: ShadowCheckpoints, position: Position, global_step: int, **state: Any) -> None:
        begin(self, position, global_step, **state)
        self._settle()

    monkeypatch.setattr(ShadowCheckpoints, "begin", begin_and_settle)


def tidy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what follows a commit is done where it is told of: when a run has died, nothing writes any more."""
    conclude = ShadowCheckpoints._conclude

    def conclude_and_wait(self: ShadowCheckpoints, job: Any, committed: Committed) -> None:
        conclude(self, job, committed)
        self._worker.wait()

    monkeypatch.setattr(ShadowCheckpoints, "_conclude", conclude_and_wait)


def shortness(completions: list[str]) -> list[float]:
    """A reward that differs between completions of any model."""
    return [sum(character.isdigit() for character in text) - len(text) / 8 for text in completions]
