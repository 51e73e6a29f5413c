"""Where a run takes its state from: a model, its own checkpoints, or another trainer's folder.

    FromModel       a new run, from Hugging Face folders
    FromRun         a run of ours continues, in its own folder or in a new one
    FromOthers      a run of MindRLHF or MindFormers continues here

A start needs the same of each (`Source`), so the session never checks which one it is.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rollforward.errors import CheckpointInvalid, CheckpointMismatch, ConfigError, ModelError
from rollforward.grpo.ports import Engine
from rollforward.inputs import is_there, read_input
from rollforward.interop.restoring import restore_foreign
from rollforward.interop.resuming import ForeignPlan, check_headers, next_position
from rollforward.position import Position
from rollforward.replay.recovery import Restored, restore
from rollforward.run import adapters
from rollforward.storage import LocalStorage, Storage
from rollforward.store import Found, Manifest, check_layout, locate_attachments, newest_incarnation
from rollforward.store.layout import COMMITS
from rollforward.store.manifest import MAX_ATTACHMENT_BYTES
from rollforward.store.place import same_place
from rollforward.tensors import Layout
from rollforward.wording import in_bytes

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""The Hugging Face files that a run keeps beside its checkpoints, so that a resume needs no such folder."""

_ROLE_WORDS = {"policy_model": "policy", "optimizer": "optimizer", "ref": "reference"}


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a start continues from, once it is in the engine."""

    position: Position
    """The next step to run."""
    lines: Sequence[str]
    """What was done, for the log."""
    checkpoint: Restored | None = None
    """A checkpoint of ours; None if there was none."""


class Source(Protocol):
    """Where a run takes its state from."""

    @property
    def run(self) -> Storage | None:
        """The run that is resumed; None for a new run."""
        ...

    @property
    def checkpoint(self) -> Manifest | None:
        """The newest valid one of ours, judged by manifest and sizes only; None if there is none."""
        ...

    @property
    def needs_lock(self) -> bool:
        """Whether it is restored under the lock of the run's folder; otherwise before anything is written."""
        ...

    def expected(self, steps_per_epoch: int) -> Position:
        """The next step to run, if everything proves intact."""
        ...

    def weights(self) -> tuple[Path | None, Path | None]:
        """Hugging Face folders from which the engine reads policy and reference; None: they are restored."""
        ...

    def newest_incarnation(self) -> int:
        """Of the run that is resumed, to distinguish this start from all earlier ones; 0 for a new run."""
        ...

    def is_in(self, storage: Storage) -> bool:
        """Whether it is a run of ours in this same place."""
        ...

    def journals(self, own: Storage) -> list[Storage]:
        """The places whose journals count, oldest first. `own`: where this run writes."""
        ...

    def check(self, layout: Layout, *, steps_per_epoch: int) -> None:
        """CheckpointMismatch when it does not fit this model or data; reads no tensor."""
        ...

    def restore(
        self, engine: Engine, layout: Layout, *, steps_per_epoch: int, until: Position | None
    ) -> Beginning:
        """Put everything in place that the engine has not read itself. Collective.

        `layout`: the whole tensors, of which the engine may hold pieces.
        `until`: not from a later position. CheckpointMismatch or NothingToResume when that is impossible.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FromModel:
    """A new run."""

    policy: Path
    reference: Path
    seed: int = 0
    """Of the adapters that are trained, if there are any."""
    run: None = field(default=None, init=False)
    checkpoint: None = field(default=None, init=False)
    needs_lock: bool = field(default=False, init=False)

    def expected(self, steps_per_epoch: int) -> Position:  # noqa: ARG002 - as the protocol has it
        """The first step."""
        return Position(0, 0)

    def weights(self) -> tuple[Path | None, Path | None]:
        """Both."""
        return self.policy, self.reference

    def newest_incarnation(self) -> int:
        """There is no earlier start."""
        return 0

    def is_in(self, storage: Storage) -> bool:  # noqa: ARG002 - as the protocol has it
        """A model is not a run."""
        return False

    def journals(self, own: Storage) -> list[Storage]:  # noqa: ARG002 - as the protocol has it
        """There is none."""
        return []

    def check(self, layout: Layout, *, steps_per_epoch: int) -> None:
        """The engine checks weights against the model as it reads them."""

    def restore(
        self,
        engine: Engine,
        layout: Layout,  # noqa: ARG002 - as the protocol has it
        *,
        steps_per_epoch: int,
        until: Position | None,  # noqa: ARG002 - as the protocol has it
    ) -> Beginning:
        """The engine has read everything but what adapters start from."""
        for name, values in adapters.initial(engine.layout()["policy_model"], self.seed):
            engine.load("policy_model", name, values)
        line = f"model: policy from {self.policy}, reference from {self.reference}"
        return Beginning(position=self.expected(steps_per_epoch), lines=[line])


@dataclass(frozen=True, kw_only=True)
class FromRun:
    """A run of ours that continues."""

    run: Storage
    found: Found
    """What the plan found; the checkpoint to restore is looked up again under the lock."""
    needs_lock: bool = field(default=True, init=False)

    @property
    def checkpoint(self) -> Manifest:
        """As the plan found it."""
        return self.found.manifest

    def expected(self, steps_per_epoch: int) -> Position:  # noqa: ARG002 - as the protocol has it
        """That of the newest checkpoint."""
        return self.found.manifest.position

    def weights(self) -> tuple[Path | None, Path | None]:
        """Neither."""
        return None, None

    def newest_incarnation(self) -> int:
        """According to its lock, manifests and journal."""
        return newest_incarnation(self.run)

    def is_in(self, storage: Storage) -> bool:
        """Whether it continues in its own place."""
        return same_place(self.run, storage)

    def journals(self, own: Storage) -> list[Storage]:
        """Its own, and that of the new folder if there already is one."""
        return [own] if self.is_in(own) else [self.run, own]

    def check(self, layout: Layout, *, steps_per_epoch: int) -> None:
        """Names, shapes and dtypes, and the steps of an epoch."""
        # One that turns out to be damaged is rejected when it is restored, and an older one taken.
        with suppress(CheckpointInvalid):
            check_layout(self.run, self.checkpoint, layout)
        saved = self.checkpoint.state.get("steps_per_epoch")
        if saved != steps_per_epoch:
            raise CheckpointMismatch(
                f"an epoch had {saved} steps when checkpoint {self.checkpoint.position} was saved and has "
                f"{steps_per_epoch} now, so the position means another place in the data",
                hint="resume with the same dataset_file and chunk_size",
            )

    def restore(
        self,
        engine: Engine,
        layout: Layout,  # noqa: ARG002 - as the protocol has it
        *,
        steps_per_epoch: int,  # noqa: ARG002 - as the protocol has it
        until: Position | None,
    ) -> Beginning:
        """The newest checkpoint that proves intact on every worker."""
        restored = restore(self.run, engine, until=until)
        manifest = restored.manifest
        lines = _rejected(restored.rejected)
        lines += [
            f"warning: {line}; its copy is whole and was used, and the next checkpoint writes it again"
            for line in locate_attachments(self.run, manifest).damaged
        ]
        lines.append(
            f"checkpoint: {manifest.position} in {self.run} is the newest valid one, "
            f"saved {manifest.created}, every byte verified"
        )
        lines.append(
            f"restored: {_by_role(restored.role_bytes)}, progress {manifest.global_step} steps, "
            f"in {restored.seconds:.2f} s"
        )
        return Beginning(position=manifest.position, lines=lines, checkpoint=restored)


@dataclass(frozen=True, kw_only=True)
class FromOthers:
    """Another trainer's run that continues here."""

    theirs: ForeignPlan
    checkpoint: None = field(default=None, init=False)
    needs_lock: bool = field(default=False, init=False)

    @property
    def run(self) -> Storage:
        """Its folder."""
        return LocalStorage(self.theirs.run)

    def expected(self, steps_per_epoch: int) -> Position:
        """That of the newest complete files."""
        return next_position(self.theirs.position, self.theirs.first_epoch, steps_per_epoch)

    def weights(self) -> tuple[Path | None, Path | None]:
        """The reference, if none was saved."""
        return None, self.theirs.reference_model

    def newest_incarnation(self) -> int:
        """No start of ours."""
        return 0

    def is_in(self, storage: Storage) -> bool:  # noqa: ARG002 - as the protocol has it
        """Their folder is not ours until our first checkpoint is in it."""
        return False

    def journals(self, own: Storage) -> list[Storage]:  # noqa: ARG002 - as the protocol has it
        """There is none."""
        return []

    def check(self, layout: Layout, *, steps_per_epoch: int) -> None:  # noqa: ARG002
        """The headers of all files against the model."""
        check_headers(self.theirs, layout)

    def restore(
        self,
        engine: Engine,
        layout: Layout,
        *,
        steps_per_epoch: int,
        until: Position | None,  # noqa: ARG002 - as the protocol has it
    ) -> Beginning:
        """The newest position that can be read on every worker."""
        found = restore_foreign(self.theirs, engine, layout)
        lines = _rejected(found.rejected)
        lines.append(
            f"checkpoint: {found.position} in {self.run} is the newest complete one; it has no manifest"
        )
        lines += [f"warning: {warning}" for warning in found.warnings]
        if found.left_out:
            lines.append(f"left out, since it is computed again: {', '.join(found.left_out)}")
        lines.append(f"restored: {_by_role(found.role_bytes)}, in {found.seconds:.2f} s")
        position = next_position(found.position, self.theirs.first_epoch, steps_per_epoch)
        return Beginning(position=position, lines=lines)


def _rejected(rejected: Sequence[tuple[Position, str]]) -> list[str]:
    return [f"checkpoint: {position} rejected: {reason}" for position, reason in rejected]


def _by_role(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{_ROLE_WORDS.get(role, role)} {in_bytes(size)}" for role, size in sizes.items())


def model_folders(actor: str, reference: str) -> FromModel:
    """The Hugging Face folders of a new run; the reference defaults to the actor's.

    Raises ConfigError when no actor is named, ModelError when a folder is not a Hugging Face folder.
    """
    if not actor:
        raise ConfigError(
            "no model to start from is named",
            hint="name a Hugging Face folder with --actor_checkpoint_path or actor_config.load",
        )
    policy = Path(actor)
    found = FromModel(policy=policy, reference=Path(reference) if reference else policy)
    for option, folder in (("actor", found.policy), ("ref", found.reference)):
        _check_model_folder(option, folder)
    return found


def _check_model_folder(option: str, folder: Path) -> None:
    name = f"--{option}_checkpoint_path {folder}"
    if not folder.is_dir():
        raise ModelError(f"{name}: no such folder", hint="name a Hugging Face folder")
    if is_there(folder / "config.json"):
        return
    if any(folder.glob("rank_*")) or (folder / COMMITS).is_dir():
        raise ModelError(
            f"{name}: this is a folder of checkpoints, not a Hugging Face folder",
            hint="to resume from a checkpoint, add --resume_training",
        )
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    raise ModelError(
        f"{name}: no config.json there; there is {there}",
        hint="name a Hugging Face folder: config.json, *.safetensors, tokenizer.json",
    )


def model_files(model: Path, tokenizer: Path) -> dict[str, bytes]:
    """The small files that a run keeps: name -> content.

    `config.json` is the model's, the others are the tokenizer's. ModelError when one cannot be read.
    """
    found: dict[str, bytes] = {}
    for name in MODEL_FILES:
        path = (model if name == "config.json" else tokenizer) / name
        if is_there(path):
            found[name] = read_model_file(path)
    return found


def read_model_file(path: Path) -> bytes:
    """One of the small files of a model's folder; ModelError when it cannot be read."""
    try:
        return read_input(path, MAX_ATTACHMENT_BYTES)
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read: {error.strerror or error}", hint="check the model's folder"
        ) from None
