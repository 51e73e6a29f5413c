"""What a run is going to do, determined and checked before anything is written.

`prepare` reads the configuration's files, the dataset, the model's folder or the checkpoint to
resume from, and returns a `Plan`, or raises an error that the user can fix. It loads no framework
and changes nothing on disk: the parent of several workers calls it for all of them.
"""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollforward import verifiers
from rollforward.config.keys import Config, what_affects_numbers
from rollforward.config.loading import Loaded
from rollforward.config.places import Outputs, outputs
from rollforward.data.dataset import load_dataset
from rollforward.data.tokenizer import Tokenizer
from rollforward.engines.base import EnginePackage
from rollforward.errors import ConfigError, RunExists
from rollforward.grpo.ports import Verifier
from rollforward.grpo.prompts import PromptSchedule
from rollforward.grpo.types import Prompt
from rollforward.models.config import CONFIG_FILE, parse_model_config
from rollforward.position import Position
from rollforward.run import branching, facts
from rollforward.run.origin import find_origin
from rollforward.run.request import Request
from rollforward.run.sources import MODEL_FILES, Source
from rollforward.run.versions import versions
from rollforward.storage import LocalStorage
from rollforward.store import Manifest
from rollforward.store.guests import read_guests
from rollforward.store.lock import check_free


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can be started."""

    config: Config
    ignored: tuple[str, ...]
    carried_by: str
    """The file in the run's folder that the configuration comes from; "" when the user gave it."""
    outputs: Outputs
    source: Source
    model_config: Mapping[str, Any]
    attachments: Mapping[str, bytes]
    """Small files of model and tokenizer stored in checkpoints: name -> content."""
    tokenizer: Tokenizer
    vocabulary: int
    """Vocabulary size of the model: token ids are below it."""
    prompts: Sequence[Prompt]
    verifiers: Sequence[Verifier]
    steps_per_epoch: int
    start: Position
    end: Position
    world_size: int
    facts: Mapping[str, Any]
    """What affects the numbers: keys of the configuration, and digests of model and dataset."""
    versions: Mapping[str, str]
    """The software that computes: exact repetition is promised only on the same versions."""
    request: Request
    """What was asked for: it is checked again once the run's folder is locked."""

    @property
    def branch(self) -> Position | None:
        """Steps before it are replayed, nothing from it on is taken over; None: everything there is."""
        return self.request.position

    @property
    def rebuild(self) -> bool:
        """Whether to stop at `branch` and save, rather than train."""
        return self.request.rebuild

    @property
    def until(self) -> Position:
        """Where this start ends."""
        return self.branch if self.rebuild and self.branch is not None else self.end

    @property
    def in_place(self) -> bool:
        """Whether a run of ours continues in its own folder."""
        return self.source.is_in(self.outputs.run)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, including those before `start`."""
        return self.end.global_step(self.steps_per_epoch)

    @property
    def fingerprint(self) -> str:
        """Digest of those `facts` that make it a different run when they change."""
        return facts.fingerprint_of(self.facts)


def prepare(
    loaded: Loaded, request: Request, package: EnginePackage, *, world_size: int, rank: int | None = None
) -> Plan:
    """Determine everything a run needs; may raise any InputError.

    A worker passes its `rank` and checks only its own journal; without one, the journals of all are checked.
    """
    config = loaded.config
    places = outputs(config)
    if not rank:
        # Before the model takes any memory: the trainer that holds the folder may need it.
        check_free(places.run)
    origin = find_origin(config, request, places, world_size)
    source, folder, files = origin.source, origin.model, origin.files
    # The first save needs it; problems with it are reported before training.
    read_guests(LocalStorage(places.run))
    model_config = parse_model_config(files[CONFIG_FILE], folder / CONFIG_FILE)
    vocab_size = package.vocab_size(model_config)
    tokenizer = Tokenizer(
        Path(config.rl_config.tokenizer_dir or folder),
        # Only what the manifest names, not other files beside it.
        carried=files,
        model_config=model_config,
        today=_chat_date(source.checkpoint),
    )
    tokenizer.check_fits(vocab_size)
    _check_token_ids(config, vocab_size)
    resolved = verifiers.resolve(config.reward_config.verifier_function)
    if not config.rl_config.dataset_file:
        raise ConfigError("no dataset is named", hint=_where_to_name_it(request))
    prompts = load_dataset(
        config.rl_config.dataset_file,
        tokenizer,
        config.generate_config.max_prompt_length,
        answers_judge=not verifiers.BY_ANSWER.isdisjoint(config.reward_config.verifier_function),
    )
    steps_per_epoch = schedule_of(config, prompts, rank=0, world_size=world_size).steps_per_epoch
    layout = package.tensor_layout(model_config)
    source.check(layout, world_size=world_size, steps_per_epoch=steps_per_epoch)
    end = _end(config, steps_per_epoch)
    plan = Plan(
        config=config,
        ignored=loaded.ignored,
        carried_by=loaded.carried_by,
        outputs=places,
        source=source,
        model_config=model_config,
        attachments=files,
        tokenizer=tokenizer,
        vocabulary=vocab_size,
        prompts=prompts,
        verifiers=resolved,
        steps_per_epoch=steps_per_epoch,
        start=source.expected(steps_per_epoch),
        end=end,
        world_size=world_size,
        facts={
            **what_affects_numbers(config),
            "actor_config.lr_schedule.decay_steps": decay_steps(config, end.global_step(steps_per_epoch)),
            "model": hashlib.sha256(files[CONFIG_FILE]).hexdigest(),
            "world_size": world_size,
            "end_tokens": list(end_tokens(config, tokenizer)),
            "pad_token": pad_token(config, tokenizer),
            **facts.of_files(files, [name for name in MODEL_FILES if name != CONFIG_FILE]),
            **facts.of_dataset(prompts),
            **facts.of_verifiers(verifiers.describe(resolved)),
            **({"chat_date": tokenizer.today.isoformat()} if tokenizer.dated else {}),
        },
        versions=versions(package),
        request=request,
    )
    if plan.branch is not None:
        _check_reachable(plan, plan.branch, range(world_size) if rank is None else (rank,))
    return plan


def _where_to_name_it(request: Request) -> str:
    if request.resume:
        return "give the run's configuration with --config: its folder carries none"
    return "name one with --dataset_file or rl_config.dataset_file"


def look_again(plan: Plan) -> None:
    """Check again, now under the lock, whether the folder may be written to.

    Another start may have begun and ended between the first check and the lock. Raises what a start would
    raise that sees the folder as it is now; RunExists when it holds another run.
    """
    now = find_origin(plan.config, plan.request, plan.outputs, plan.world_size)
    before, found = plan.source.checkpoint, now.source.checkpoint
    same_run = found is None if before is None else found is not None and found.run_id == before.run_id
    if not same_run or now.files != plan.attachments:
        raise RunExists(
            f"{plan.outputs.run} was changed by another start while this one was starting",
            hint="start again: its content is then checked again",
        )


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


def _chat_date(manifest: Manifest | None) -> datetime.date | None:
    """The date that the run's first start passed to its chat templates, so that the prompts stay the same."""
    facts = manifest.state.get("facts") if manifest is not None else None
    told = facts.get("chat_date") if isinstance(facts, dict) else None
    try:
        return datetime.date.fromisoformat(told) if isinstance(told, str) else None
    except ValueError:
        return None


def _check_reachable(plan: Plan, position: Position, ranks: Sequence[int]) -> None:
    """Raise NothingToResume, CheckpointMismatch or ConfigError unless these ranks' journals lead there."""
    run, manifest = plan.source.run, plan.source.checkpoint
    if run is None or manifest is None:
        raise ConfigError(
            f"there is no journal to go to step {position} with",
            hint="name a run with --actor_checkpoint_path",
        )
    branching.check_named(position, plan.steps_per_epoch, plan.end)
    if plan.rebuild or position != manifest.position:
        branching.check_same_facts(manifest, plan.facts, position)
    branching.check_reach(
        LocalStorage(run),
        manifest,
        position,
        ranks=ranks,
        fingerprint=plan.fingerprint,
        also=facts.fingerprints(plan.facts, branching.facts_of(manifest)),
        chunks_per_step=plan.config.rl_config.num_rollouts,
        steps_per_epoch=plan.steps_per_epoch,
    )


def _check_token_ids(config: Config, vocab_size: int) -> None:
    """Raise ConfigError for configured token ids that the model does not have."""
    sampling = config.generate_config.sampling_config
    ids = {"eos_token_id": sampling.eos_token_id or (), "pad_token_id": (sampling.pad_token_id or 0,)}
    for name, given in ids.items():
        for value in given:
            if value >= vocab_size:
                raise ConfigError(
                    f"generate_config.sampling_config.{name}: {value}, but ids end at {vocab_size - 1}",
                    hint="leave it out: the model's folder says it",
                )


def _end(config: Config, steps_per_epoch: int) -> Position:
    total = config.rl_config.epochs * steps_per_epoch
    if config.rl_config.max_steps:
        total = min(total, config.rl_config.max_steps)
    return Position(*divmod(total, steps_per_epoch))


def end_tokens(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a completion."""
    return config.generate_config.sampling_config.eos_token_id or tokenizer.eos_token_ids


def pad_token(config: Config, tokenizer: Tokenizer) -> int:
    """The token that pads prompts and completions."""
    given = config.generate_config.sampling_config.pad_token_id
    return tokenizer.pad_token_id if given is None else given


def decay_steps(config: Config, total_steps: int) -> int:
    """Optimizer steps until the learning rate has decayed; by default those of the whole run.

    So by default a longer run (`epochs`, `max_steps`) has a different learning rate from its first step on.
    """
    schedule = config.actor_config.lr_schedule
    whole = total_steps * config.rl_config.num_iterations
    return schedule.decay_steps or max(whole, schedule.warmup_step + 1)
