"""What a run is going to do, found out and checked before anything is written.

`prepare` reads the configuration's files, the dataset, the model's folder or the checkpoint to
resume from, and answers with a `Plan`, or with the error that a user can mend. It loads no
framework and changes nothing on disk: the parent of several workers calls it for all of them.
"""

import functools
import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rollforward
from rollforward.config.keys import Config, fingerprint, what_affects_numbers
from rollforward.config.loading import Loaded
from rollforward.config.places import Outputs, outputs
from rollforward.data.dataset import load_dataset
from rollforward.data.tokenizer import Tokenizer
from rollforward.errors import CheckpointMismatch, ConfigError, NothingToResume, RunExists
from rollforward.grpo.ports import Verifier
from rollforward.grpo.prompts import PromptSchedule
from rollforward.grpo.types import Prompt
from rollforward.inspection import doctor
from rollforward.interop import resuming
from rollforward.interop.resuming import FromForeign
from rollforward.interop.role_folders import CheckpointFolders, checkpoint_folders, name_checkpoint_folders
from rollforward.models.config import CONFIG_FILE, parse_model_config
from rollforward.position import Position
from rollforward.run import branching
from rollforward.run.engine import EnginePackage
from rollforward.run.sources import FromModel, model_files, model_folders
from rollforward.storage import LocalStorage
from rollforward.store import Found, Manifest, check_layout, find, list_checkpoints, read_attachments
from rollforward.store.lock import check_free
from rollforward.verifiers import resolve


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line asks for besides the configuration."""

    resume: bool
    actor_checkpoint_path: str = ""
    ref_checkpoint_path: str = ""
    position: Position | None = None
    """With `resume`: go on from here, in a new folder, and take over nothing beyond; None: the newest."""
    rebuild: bool = False
    """With `position`: its checkpoint is all that is wanted."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can be started."""

    config: Config
    ignored: tuple[str, ...]
    outputs: Outputs
    source: FromModel | CheckpointFolders | FromForeign
    found: Found | None
    """The checkpoint to resume from; None for a new run and where there are no manifests."""
    model_config: Mapping[str, Any]
    attachments: Mapping[str, bytes]
    """Small files of model and tokenizer that checkpoints carry: name -> content."""
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    verifiers: Sequence[Verifier]
    steps_per_epoch: int
    start: Position
    end: Position
    world_size: int
    facts: Mapping[str, Any]
    """What influences the numbers: keys of the configuration, and digests of model and dataset."""
    branch: Position | None = None
    """Steps before it are replayed, nothing of it or beyond is taken over; None: whatever there is."""
    rebuild: bool = False
    """Stop at `branch` and save, rather than train."""

    @property
    def until(self) -> Position:
        """Where this start ends."""
        return self.branch if self.rebuild and self.branch is not None else self.end

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, those before `start` included."""
        return self.end.global_step(self.steps_per_epoch)

    @property
    def fingerprint(self) -> str:
        """Digest of `facts`."""
        return fingerprint(self.facts)


def prepare(
    loaded: Loaded, asked: Asked, engines: EnginePackage, *, world_size: int, rank: int | None = None
) -> Plan:
    """Find out all that a run needs; every InputError of the errors' tree can come from here.

    A worker says its `rank`, and looks at its own journal only; without one, those of all are looked at.
    """
    config = loaded.config
    places = outputs(config)
    if not rank:
        # Before anything of the model is in memory: the trainer that holds the folder may need it.
        check_free(places.run)
    source, found, folder, files = _source(config, asked, places, world_size)
    model_config = parse_model_config(files[CONFIG_FILE], folder / CONFIG_FILE)
    vocab_size = engines.vocab_size(model_config)
    tokenizer = Tokenizer(Path(config.rl_config.tokenizer_dir or folder))
    tokenizer.check_fits(vocab_size)
    _check_token_ids(config, vocab_size)
    verifiers = resolve(config.reward_config.verifier_function)
    if not config.rl_config.dataset_file:
        raise ConfigError(
            "no dataset is named", hint="name one with --dataset_file or rl_config.dataset_file"
        )
    prompts = load_dataset(config.rl_config.dataset_file, tokenizer, config.generate_config.max_prompt_length)
    steps_per_epoch = schedule_of(config, prompts, rank=0, world_size=world_size).steps_per_epoch
    if found is not None:
        check_layout(found.manifest, engines.tensor_layout(model_config), world_size=world_size)
        _check_resumable(found.manifest, steps_per_epoch)
    elif isinstance(source, FromForeign):
        resuming.check_headers(source, engines.tensor_layout(model_config))
    end = _end(config, steps_per_epoch)
    plan = Plan(
        config=config,
        ignored=loaded.ignored,
        outputs=places,
        source=source,
        found=found,
        model_config=model_config,
        attachments=files,
        tokenizer=tokenizer,
        prompts=prompts,
        verifiers=verifiers,
        steps_per_epoch=steps_per_epoch,
        start=_start(source, found, steps_per_epoch),
        end=end,
        world_size=world_size,
        facts={
            **what_affects_numbers(config),
            "actor_config.lr_schedule.decay_steps": decay_steps(config, end.global_step(steps_per_epoch)),
            "model": hashlib.sha256(files[CONFIG_FILE]).hexdigest(),
            "dataset": _dataset_digest(prompts),
            "world_size": world_size,
        },
        branch=asked.position,
        rebuild=asked.rebuild,
    )
    if isinstance(source, CheckpointFolders) and found is not None and plan.branch is not None:
        ranks = range(world_size) if rank is None else (rank,)
        _check_reachable(plan, plan.branch, source, found.manifest, ranks)
    return plan


def schedule_of(config: Config, prompts: Sequence[Prompt], *, rank: int, world_size: int) -> PromptSchedule:
    """Which prompts a worker sees; DataError when the dataset is too small for one step."""
    return PromptSchedule(
        prompts=prompts,
        seed=config.rl_config.seed,
        chunk_size=config.rl_config.chunk_size,
        chunks_per_step=config.rl_config.num_rollouts,
        rank=rank,
        world_size=world_size,
    )


@functools.cache
def versions() -> Mapping[str, str]:
    """What computes: exact repetition is promised on the same versions only."""
    # Found out once: reading what packages say of themselves takes 50 ms.
    return {
        "rollforward": f"{rollforward.__version__}+{_sources_digest()}",
        "mindspore": version("mindspore"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _sources_digest() -> str:
    """Tells changed code apart where the version says nothing, as while it is being worked on."""
    found = hashlib.sha256()
    package = Path(rollforward.__file__).parent
    for room in ("engines", "grpo"):
        for source in sorted((package / room).rglob("*.py")):
            found.update(source.read_bytes())
    return found.hexdigest()[:8]


_Source = tuple[FromModel | CheckpointFolders | FromForeign, Found | None, Path, dict[str, bytes]]
"""Where the weights come from, the checkpoint that was found, the tokenizer's folder, the model's files."""


def _source(config: Config, asked: Asked, places: Outputs, world_size: int) -> _Source:
    named = name_checkpoint_folders(asked.actor_checkpoint_path, asked.ref_checkpoint_path, places.run)
    if asked.position is not None:
        _check_branch(asked, places, named)
    if not asked.resume:
        return _new(config, asked, places)
    if resuming.is_foreign(named):
        return _resumed_foreign(config, asked, places, named, world_size)
    return _resumed(asked, places)


def _new(config: Config, asked: Asked, places: Outputs) -> tuple[FromModel, None, Path, dict[str, bytes]]:
    source = model_folders(
        asked.actor_checkpoint_path or config.actor_config.load,
        asked.ref_checkpoint_path or config.ref_config.load,
    )
    _refuse_used_folder(places.run, "to go on with it add --resume_training")
    tokenizer = Path(config.rl_config.tokenizer_dir or source.policy)
    return source, None, source.policy, model_files(source.policy, tokenizer)


def _resumed(asked: Asked, places: Outputs) -> tuple[CheckpointFolders, Found, Path, dict[str, bytes]]:
    source = checkpoint_folders(asked.actor_checkpoint_path, asked.ref_checkpoint_path, places.run)
    if source.reference.parent.resolve() != source.run.resolve():
        raise CheckpointMismatch(
            f"the policy is to come from {source.run} and the reference from {source.reference.parent}: "
            "a checkpoint holds both, from the same step",
            hint="name train/ and ref/ of one run",
        )
    storage = LocalStorage(source.run)
    try:
        found = find(storage, until=asked.position)
    except NothingToResume as error:
        raise NothingToResume(_with_findings(error.message, source), hint=error.hint) from None
    if places.run.resolve() != source.run.resolve():
        _refuse_used_folder(
            places.run,
            f"to go on from what it holds: --actor_checkpoint_path {places.run / 'train'}",
            option="--out" if asked.rebuild else "--save_checkpoint_dir",
        )
    files = read_attachments(storage, found.manifest)
    if CONFIG_FILE not in files:
        raise NothingToResume(
            f"checkpoint {found.manifest.position} in {source.run} carries no {CONFIG_FILE}"
        )
    first = next(item for item in found.manifest.attachments if item.name == CONFIG_FILE)
    return source, found, (source.run / first.path).parent, files


def _resumed_foreign(
    config: Config, asked: Asked, places: Outputs, named: CheckpointFolders, world_size: int
) -> tuple[FromForeign, None, Path, dict[str, bytes]]:
    """From a folder without manifests; it may become this run's own, at its first checkpoint."""
    actor = config.actor_config
    source = resuming.look(
        named,
        reference_named=asked.ref_checkpoint_path,
        reference_model=config.ref_config.load or actor.load,
        reference_is_synced=config.ref_config.sync_ref_model,
        model_folders=(actor.model_config, actor.load, config.rl_config.tokenizer_dir),
        own_strategies=places.strategy,
        world_size=world_size,
    )
    _refuse_used_folder(
        places.run, f"to go on from what it holds: --actor_checkpoint_path {places.run / 'train'}"
    )
    folder = source.model.parent
    files = model_files(folder, Path(config.rl_config.tokenizer_dir or folder))
    files[CONFIG_FILE] = source.model.read_bytes()
    return source, None, folder, files


def _start(
    source: FromModel | CheckpointFolders | FromForeign, found: Found | None, steps_per_epoch: int
) -> Position:
    if found is not None:
        return found.manifest.position
    if isinstance(source, FromForeign):
        return resuming.next_position(source.position, source.first_epoch, steps_per_epoch)
    return Position(0, 0)


def _check_branch(asked: Asked, places: Outputs, named: CheckpointFolders) -> None:
    """ConfigError unless the position is one of an earlier run of ours and the folder is a new one."""
    if not asked.resume:
        raise ConfigError(
            "--resume_position says where to go on from, so it needs --resume_training",
            hint="add --resume_training and name the run with --actor_checkpoint_path",
        )
    if resuming.is_foreign(named):
        raise ConfigError(
            f"{named.run} has no journal to go to step {asked.position} with: another trainer wrote it",
            hint="without --resume_position it is resumed from its newest checkpoint",
        )
    if places.run.resolve() == named.run.resolve():
        raise ConfigError(
            f"going on from step {asked.position} leaves what {named.run} did from there on behind, "
            "so it needs a folder of its own",
            hint=f"name a new one with {'--out' if asked.rebuild else '--save_checkpoint_dir'}",
        )


def _check_reachable(
    plan: Plan, position: Position, source: CheckpointFolders, manifest: Manifest, ranks: Sequence[int]
) -> None:
    branching.check_named(position, plan.steps_per_epoch, plan.end)
    if plan.rebuild or position != manifest.position:
        branching.check_same_facts(manifest, plan.facts, position)
    branching.check_reach(
        LocalStorage(source.run),
        manifest,
        position,
        ranks=ranks,
        fingerprint=plan.fingerprint,
        chunks_per_step=plan.config.rl_config.num_rollouts,
        steps_per_epoch=plan.steps_per_epoch,
    )


def _with_findings(message: str, source: CheckpointFolders) -> str:
    """The message, and what the doctor says about the folders."""
    problems = [finding.text for finding in doctor.examine(source) if finding.level == "problem"]
    # Why a checkpoint does not count is in the message already.
    new = [text for text in problems if text.partition(": ")[2] not in message]
    return "\n".join([message, *(f"  {text}" for text in new)])


def _refuse_used_folder(run: Path, hint: str, *, option: str = "--save_checkpoint_dir") -> None:
    held = list_checkpoints(LocalStorage(run))
    if held:
        raise RunExists(
            f"{run} already holds a run: {len(held)} checkpoints, the newest {held[0].position}",
            hint=f"{hint}; for a new run name another folder with {option}",
        )


def _check_token_ids(config: Config, vocab_size: int) -> None:
    """ConfigError for token ids of the configuration that the model does not have."""
    sampling = config.generate_config.sampling_config
    ids = {"eos_token_id": sampling.eos_token_id or (), "pad_token_id": (sampling.pad_token_id or 0,)}
    for name, given in ids.items():
        for value in given:
            if value >= vocab_size:
                raise ConfigError(
                    f"generate_config.sampling_config.{name}: {value}, but ids end at {vocab_size - 1}",
                    hint="leave it out: the model's folder says it",
                )


def _check_resumable(manifest: Manifest, steps_per_epoch: int) -> None:
    saved = manifest.state.get("steps_per_epoch")
    if saved != steps_per_epoch:
        raise CheckpointMismatch(
            f"an epoch had {saved} steps when checkpoint {manifest.position} was saved and has "
            f"{steps_per_epoch} now, so the position means another place in the data",
            hint="resume with the same dataset_file, chunk_size and num_rollouts",
        )


def _end(config: Config, steps_per_epoch: int) -> Position:
    total = config.rl_config.epochs * steps_per_epoch
    if config.rl_config.max_steps:
        total = min(total, config.rl_config.max_steps)
    return Position(*divmod(total, steps_per_epoch))


def decay_steps(config: Config, total_steps: int) -> int:
    """Optimizer steps until the learning rate has come down; those of the whole run when no number is given.

    So a run that is made longer (`epochs`, `max_steps`) has another learning rate from its first step on.
    """
    schedule = config.actor_config.lr_schedule
    whole = total_steps * config.rl_config.num_iterations
    return schedule.decay_steps or max(whole, schedule.warmup_step + 1)


def _dataset_digest(prompts: Sequence[Prompt]) -> str:
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(repr((prompt.token_ids, prompt.answer)).encode())
    return found.hexdigest()
