"""Finds where a run takes its state from, given the command line, before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rollforward.config.keys import Config
from rollforward.config.places import Outputs
from rollforward.errors import CheckpointMismatch, ConfigError, NothingToResume, RunExists
from rollforward.interop import resuming, traces
from rollforward.interop.role_folders import CheckpointFolders, checkpoint_folders, name_checkpoint_folders
from rollforward.models.config import CONFIG_FILE
from rollforward.models.lora import ADAPTER_CONFIG
from rollforward.replay import configurations, metrics, report
from rollforward.run import adapters
from rollforward.run.places import resumed_address
from rollforward.run.request import Request
from rollforward.run.sources import (
    FromOthers,
    FromRun,
    Source,
    model_files,
    model_folders,
    read_model_file,
)
from rollforward.storage import LocalStorage, Storage
from rollforward.storage.address import open_storage
from rollforward.storage.local import same_folder
from rollforward.store import find, list_checkpoints, locate_attachments
from rollforward.store.lock import read_owner
from rollforward.store.place import RunPlace

_REPLACED = (configurations.FILE, metrics.FILE, report.FILE)
"""Files directly in the run's folder that a start replaces as a whole."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run takes its state from, and the small files that go with it."""

    source: Source
    model: Path
    """The folder that these files lie in."""
    files: Mapping[str, bytes]
    """Of model and tokenizer, and of adapters: name -> content."""
    base: Path | None = None
    """The folder of the model beside which adapters are trained; None without adapters."""


def find_origin(
    config: Config, request: Request, places: Outputs, place: RunPlace, world_size: int
) -> Origin:
    """Find where the run takes its state from; raises every InputError about folders and checkpoints."""
    actor, reference = request.actor_checkpoint_path, request.ref_checkpoint_path
    address = resumed_address(actor, reference, places) if request.resume else None
    if address is not None:
        run = open_storage(address)
        if request.position is not None:
            _check_elsewhere(request, place, run)
        return _resumed(config, request, place, run)
    named = name_checkpoint_folders(request.actor_checkpoint_path, request.ref_checkpoint_path, places.run)
    if request.position is not None:
        _check_branch(request, place, named)
    if not request.resume:
        return _new(config, request, place)
    traces.refuse_lost_commits(named)
    if resuming.is_foreign(named):
        if config.actor_config.lora.rank:
            raise ConfigError(
                f"actor_config.lora.rank is {config.actor_config.lora.rank}, but {named.run} is another "
                "trainer's run, of all weights",
                hint="set lora.rank: 0; or start a new run from a Hugging Face folder of its policy",
            )
        return _resumed_foreign(config, request, places, place, named, world_size)
    return _resumed(config, request, place, LocalStorage(_one_folder(request, places)))


def _new(config: Config, request: Request, place: RunPlace) -> Origin:
    source = model_folders(
        request.actor_checkpoint_path or config.actor_config.load,
        request.ref_checkpoint_path or config.ref_config.load,
    )
    _refuse_used(place, "to resume it, add --resume_training")
    _refuse_traces(place.storage)
    source = replace(source, seed=config.rl_config.seed)
    tokenizer = Path(config.rl_config.tokenizer_dir or source.policy)
    files = model_files(source.policy, tokenizer)
    lora = adapters.lora_of(config)
    if lora is None:
        return Origin(source=source, model=source.policy, files=files)
    if not same_folder(source.policy, source.reference):
        raise ConfigError(
            f"actor_config.lora: the reference is the base with the adapters off, which is {source.policy}, "
            f"not {source.reference}",
            hint="leave --ref_checkpoint_path out",
        )
    files[ADAPTER_CONFIG] = adapters.about(lora, source.policy)
    return Origin(source=source, model=source.policy, files=files, base=source.policy)


def _one_folder(request: Request, places: Outputs) -> Path:
    """The folder of the run that is resumed."""
    source = checkpoint_folders(request.actor_checkpoint_path, request.ref_checkpoint_path, places.run)
    if not same_folder(source.reference.parent, source.run):
        raise CheckpointMismatch(
            f"the policy is to come from {source.run} and the reference from {source.reference.parent}: "
            "a checkpoint holds both, from the same step",
            hint="name train/ and ref/ of one run",
        )
    return source.run


def _resumed(config: Config, request: Request, place: RunPlace, storage: Storage) -> Origin:
    try:
        found = find(storage, until=request.position)
    except NothingToResume as error:
        raise NothingToResume(_with_findings(error.message, storage), hint=error.hint) from None
    if not place.is_at(storage):
        _refuse_used(
            place,
            f"to resume from what it holds: --actor_checkpoint_path {place.storage}/train",
            option="--out" if request.rebuild else "--save_checkpoint_dir",
        )
    located = locate_attachments(storage, found.manifest)
    files = located.contents
    if config.rl_config.tokenizer_dir and CONFIG_FILE in files:
        tokenizer = Path(config.rl_config.tokenizer_dir)
        files = model_files(tokenizer, tokenizer) | {CONFIG_FILE: files[CONFIG_FILE]}
    if CONFIG_FILE not in files:
        raise NothingToResume(f"checkpoint {found.manifest.position} in {storage} carries no {CONFIG_FILE}")
    lora = adapters.lora_of(config)
    base = adapters.base_of_resumed(config, lora, located.contents)
    if lora is not None and base is not None:
        files = {**files, ADAPTER_CONFIG: adapters.about(lora, base)}
    return Origin(
        source=FromRun(run=storage, found=found),
        model=Path(str(storage), located.folder),
        files=files,
        base=base,
    )


def _resumed_foreign(
    config: Config,
    request: Request,
    places: Outputs,
    place: RunPlace,
    named: CheckpointFolders,
    world_size: int,
) -> Origin:
    """Resume from a folder without manifests; it may become this run's own at its first checkpoint."""
    actor = config.actor_config
    source = resuming.look(
        named,
        reference_named=request.ref_checkpoint_path,
        reference_model=config.ref_config.load or actor.load,
        reference_is_synced=config.ref_config.sync_ref_model,
        model_folders=(actor.model_config, actor.load, config.rl_config.tokenizer_dir),
        own_strategies=places.strategy,
        clears_own="strategy" in places.named,
        world_size=world_size,
    )
    _refuse_used(place, f"to resume from what it holds: --actor_checkpoint_path {place.storage}/train")
    folder = source.model.parent
    files = model_files(folder, Path(config.rl_config.tokenizer_dir or folder))
    files[CONFIG_FILE] = read_model_file(source.model)
    return Origin(source=FromOthers(theirs=source), model=folder, files=files)


def _check_branch(request: Request, place: RunPlace, named: CheckpointFolders) -> None:
    """Raise ConfigError unless the position belongs to an earlier run of ours and the folder is new."""
    if not request.resume:
        raise ConfigError(
            "--resume_position says where to resume from, so it needs --resume_training",
            hint="add --resume_training and name the run with --actor_checkpoint_path",
        )
    if resuming.is_foreign(named):
        raise ConfigError(
            f"{named.run} has no journal to go to step {request.position} with: it was written by another "
            "trainer",
            hint="without --resume_position it is resumed from its newest checkpoint",
        )
    _check_elsewhere(request, place, LocalStorage(named.run))


def _check_elsewhere(request: Request, place: RunPlace, run: Storage) -> None:
    """Raise ConfigError unless the run goes on in another place than it was in."""
    if place.is_at(run):
        raise ConfigError(
            f"resuming from step {request.position} leaves what {run} did from there on behind, "
            "so it needs a folder of its own",
            hint=f"name a new one with {'--out' if request.rebuild else '--save_checkpoint_dir'}",
        )


def _with_findings(message: str, storage: Storage) -> str:
    """The message, with what the doctor finds in the folders of this machine."""
    if not isinstance(storage, LocalStorage):
        return message
    # Imported where something is wrong: a start that finds nothing wrong is sooner at its first step.
    from rollforward.inspection import doctor

    found = doctor.examine(name_checkpoint_folders("", "", Path(storage.root)))
    problems = [finding.text for finding in found if finding.level == "problem"]
    # The message already says why a checkpoint does not count.
    new = [text for text in problems if text.partition(": ")[2] not in message]
    return "\n".join([message, *(f"  {text}" for text in new)])


def _refuse_traces(storage: Storage) -> None:
    """Raise RunExists when a new run would overwrite the figures and the journal of another."""
    found = traces.finished_work(storage)
    if found:
        raise RunExists(
            f"{storage} holds what is left of a run whose checkpoints are gone: {'; '.join(found)}",
            hint="name another folder with --save_checkpoint_dir, or move these away",
        )


def _refuse_used(place: RunPlace, hint: str, *, option: str = "--save_checkpoint_dir") -> None:
    storage = run = place.storage
    folders = name_checkpoint_folders("", "", place.folder)
    found = [] if place.remote else traces.lost_commits(folders)
    if found:
        raise RunExists(
            f"{run} already holds a run, whose manifests are gone: {'; '.join(found)}",
            hint=f"name another folder with {option}, or {traces.what_to_try(folders)}",
        )
    held = list_checkpoints(storage)
    if held:
        raise RunExists(
            f"{run} already holds a run: {len(held)} checkpoints, the newest {held[0].position}",
            hint=f"{hint}; for a new run name another folder with {option}",
        )
    # A folder in which a run was started has our lock, and files with our names there are ours.
    theirs = [name for name in _REPLACED if storage.stat(name) is not None]
    if theirs and read_owner(storage) is None:
        raise RunExists(
            f"{run} holds {' and '.join(theirs)} without being a run's folder, and a run would replace that",
            hint=f"move it away, or name another folder with {option}",
        )
