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
from rollforward.data.dataset import RememberedDataset
from rollforward.data.tokenizer import Tokenizer
from rollforward.engines.base import EnginePackage
from rollforward.errors import CheckpointMismatch, ConfigError, RunExists
from rollforward.grpo.addition import divisors
from rollforward.grpo.ports import Verifier
from rollforward.grpo.prompts import PromptSchedule
from rollforward.grpo.types import LoraSettings, Prompt
from rollforward.interop.adapters import BASE
from rollforward.models.config import CONFIG_FILE, parse_model_config
from rollforward.position import Position
from rollforward.run import adapters, branching, facts
from rollforward.run.origin import find_origin
from rollforward.run.places import place_of
from rollforward.run.request import Request
from rollforward.run.sources import MODEL_FILES, Source
from rollforward.run.versions import versions
from rollforward.store import Manifest
from rollforward.store.guests import read_guests
from rollforward.store.lock import check_free
from rollforward.store.place import RunPlace
from rollforward.tensors import Layout
from rollforward.wording import counted


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that can be started."""

    config: Config
    ignored: tuple[str, ...]
    carried_by: str
    """The file in the run's folder that the configuration comes from; "" when the user gave it."""
    outputs: Outputs
    place: RunPlace
    """Where the run is: its folder, or an address and a working folder."""
    source: Source
    model_config: Mapping[str, Any]
    lora: LoraSettings | None
    """The adapters that are trained instead of the model."""
    base: Path | None
    """With them: the folder of the model that they stand beside."""
    layout: Layout
    """Of the model and its optimizer, whole."""
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
    chunks_per_step: int
    """Over all workers: what the run started with, whatever the number of workers is now."""
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
    def model_parallel(self) -> int:
        """Workers that hold the model together."""
        return self.config.actor_config.parallel_config.model_parallel

    @property
    def replicas(self) -> int:
        """How many copies of the model share the chunks of a step."""
        return self.world_size // self.model_parallel

    @property
    def chunks_per_worker(self) -> int:
        """What `num_rollouts` means in this start."""
        return self.chunks_per_step // self.replicas

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
        return self.source.is_in(self.place.storage)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, including those before `start`."""
        return self.end.global_step(self.steps_per_epoch)

    @property
    def fingerprint(self) -> str:
        """Digest of those `facts` that make it a different run when they change."""
        return facts.fingerprint_of(self.facts)


def prepare(
    loaded: Loaded,
    request: Request,
    package: EnginePackage,
    *,
    world_size: int,
    rank: int | None = None,
    beside: bool = False,
    dataset: RememberedDataset | None = None,
) -> Plan:
    """Determine everything a run needs; may raise any InputError, and StorageError from a service.

    `rank`: of a worker; None in the process that starts them all, or is alone. `beside`: it will start
    when the trainer that holds the folder now does not any more. `dataset` spares a second plan reading it.
    """
    config = loaded.config
    places = outputs(config)
    if not rank and not beside:
        # Before the model takes any memory: the trainer that holds the folder may need it.
        check_free(places.run)
    place = place_of(places)
    origin = find_origin(config, request, places, place, world_size)
    source, folder, files = origin.source, origin.model, origin.files
    # The first save needs it; problems with it are reported before training.
    read_guests(place.storage)
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
    prompts = (dataset or RememberedDataset()).load(
        config.rl_config.dataset_file,
        tokenizer,
        config.generate_config.max_prompt_length,
        files=files,
        answers_judge=not verifiers.BY_ANSWER.isdisjoint(config.reward_config.verifier_function),
    )
    replicas = replicas_of(config, package, model_config, world_size)
    chunks_per_step = _chunks_per_step(config, source, replicas)
    steps_per_epoch = schedule_of(config, prompts, chunks_per_step).steps_per_epoch
    _check_shared(chunks_per_step, replicas, world_size // replicas)
    lora = adapters.lora_of(config)
    layout = package.tensor_layout(model_config, lora) if lora else package.tensor_layout(model_config)
    source.check(layout, steps_per_epoch=steps_per_epoch)
    base = None if origin.base is None else adapters.digest_of(origin.base, model_config)
    if origin.base is not None and base is not None:
        adapters.check_base(source.checkpoint, origin.base, base)
    end = _end(config, steps_per_epoch)
    plan = Plan(
        config=config,
        ignored=loaded.ignored,
        carried_by=loaded.carried_by,
        outputs=places,
        place=place,
        source=source,
        model_config=model_config,
        lora=lora,
        base=origin.base,
        layout=layout,
        attachments=files,
        tokenizer=tokenizer,
        vocabulary=vocab_size,
        prompts=prompts,
        verifiers=resolved,
        steps_per_epoch=steps_per_epoch,
        start=source.expected(steps_per_epoch),
        end=end,
        world_size=world_size,
        chunks_per_step=chunks_per_step,
        facts={
            **what_affects_numbers(config),
            "actor_config.lr_schedule.decay_steps": decay_steps(config, end.global_step(steps_per_epoch)),
            "model": hashlib.sha256(files[CONFIG_FILE]).hexdigest(),
            **facts.of_step(chunks_per_step),
            "end_tokens": list(end_tokens(config, tokenizer)),
            "pad_token": pad_token(config, tokenizer),
            **facts.of_files(files, [name for name in MODEL_FILES if name != CONFIG_FILE]),
            **facts.of_dataset(prompts),
            **facts.of_verifiers(verifiers.describe(resolved)),
            **({BASE: base} if base is not None else {}),
            **({"chat_date": tokenizer.today.isoformat()} if tokenizer.dated else {}),
        },
        versions=versions(package),
        request=request,
    )
    if plan.branch is not None:
        _check_reachable(plan, plan.branch)
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
    now = find_origin(plan.config, plan.request, plan.outputs, plan.place, plan.world_size)
    before, found = plan.source.checkpoint, now.source.checkpoint
    same_run = found is None if before is None else found is not None and found.run_id == before.run_id
    if not same_run or now.files != plan.attachments:
        raise RunExists(
            f"{plan.outputs.where} was changed by another start while this one was starting",
            hint="start again: its content is then checked again",
        )


def replicas_of(
    config: Config, package: EnginePackage, model_config: Mapping[str, Any], world_size: int
) -> int:
    """Over how many copies of the model these workers are; ModelError or ConfigError when over none."""
    each = config.actor_config.parallel_config.model_parallel
    if each == 1:
        return world_size
    package.check_model_parallel(model_config, each)
    if world_size % each:
        raise ConfigError(
            f"actor_config.parallel_config.model_parallel is {each}, and {counted(world_size, 'worker')} "
            f"cannot be shared out in groups of {each}",
            hint=f"start {each} workers, or a multiple: --workers {each}",
        )
    return world_size // each


def _chunks_per_step(config: Config, source: Source, replicas: int) -> int:
    """What the run started with."""
    given, saved = config.rl_config.num_rollouts, source.checkpoint
    if saved is None:
        return replicas * given
    return facts.chunks_in(branching.facts_of(saved)) or saved.world_size * given


def _check_shared(chunks_per_step: int, replicas: int, model_parallel: int) -> None:
    """Raise CheckpointMismatch when these workers, or groups of them, cannot share a step's chunks evenly."""
    if chunks_per_step % replicas:
        able = ", ".join(str(number * model_parallel) for number in divisors(chunks_per_step))
        who, which = f"{replicas} workers", f"that divides {chunks_per_step}"
        if model_parallel > 1:
            who = f"{replicas} groups of {model_parallel} workers"
            which = f"of which {model_parallel} make a group, and whose groups divide {chunks_per_step}"
        raise CheckpointMismatch(
            f"a step of this run has {counted(chunks_per_step, 'chunk')}, fixed when it started, and {who} "
            "cannot share them evenly",
            hint=f"start with a number of workers {which}: {able}",
        )


def schedule_of(config: Config, prompts: Sequence[Prompt], chunks_per_step: int) -> PromptSchedule:
    """Which prompts a chunk has; DataError when the dataset is too small for one step."""
    return PromptSchedule(
        prompts=prompts,
        seed=config.rl_config.seed,
        chunk_size=config.rl_config.chunk_size,
        chunks_per_step=chunks_per_step,
    )


def _chat_date(manifest: Manifest | None) -> datetime.date | None:
    """The date that the run's first start passed to its chat templates, so that the prompts stay the same."""
    facts = manifest.state.get("facts") if manifest is not None else None
    told = facts.get("chat_date") if isinstance(facts, dict) else None
    try:
        return datetime.date.fromisoformat(told) if isinstance(told, str) else None
    except ValueError:
        return None


def _check_reachable(plan: Plan, position: Position) -> None:
    """Raise NothingToResume, CheckpointMismatch or ConfigError unless the journal leads there."""
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
        run,
        manifest,
        position,
        fingerprint=plan.fingerprint,
        also=facts.fingerprints(plan.facts, branching.facts_of(manifest)),
        chunks_per_step=plan.chunks_per_step,
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
