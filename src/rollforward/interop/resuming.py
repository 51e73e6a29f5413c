"""Resuming from a folder that MindRLHF or MindFormers wrote: no manifests, other names, no digests.

    the plan      here: which position, where do model and reference come from, do the headers fit
    a worker      in `restoring`: reads every tensor, and only then loads any into the engine

Nothing is written. A damaged file rejects its position, and the next older one is tried. A tensor that
has no counterpart, is missing or has another shape is a CheckpointMismatch; it lists all of them.

After data-parallel training every rank's files hold whole tensors: then there must be as many workers
as ranks, and each reads its own. Tensors that were split over ranks are reassembled, on any number of
workers, if their trainer's strategy files are found: in `strategy/` in the folder or beside it, where
MindRLHF and MindFormers leave them, or in --save_strategy_dir.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray

from rollforward.errors import (
    CheckpointInvalid,
    CheckpointMismatch,
    ConfigError,
    ModelError,
    NothingToResume,
)
from rollforward.inputs import read_input
from rollforward.interop.files import read_layout
from rollforward.interop.folders import ForeignCheckpoint, find_foreign
from rollforward.interop.joining import is_split, joined_layout
from rollforward.interop.mapping import MappedTensors, assign
from rollforward.interop.names import is_moment
from rollforward.interop.role_folders import CheckpointFolders
from rollforward.interop.strategies import FOLDERS, Strategy, find_strategy
from rollforward.models.config import CONFIG_FILE, parse_model_config
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.storage.local import same_folder
from rollforward.store.catalog import positions
from rollforward.store.layout import META, parse_rank
from rollforward.tensors import Layout

_T = TypeVar("_T")
_LISTED = 20
_MOST_CONFIG = 1 << 24
"""Largest config.json, in bytes."""


@dataclass(frozen=True, kw_only=True)
class ForeignPlan:
    """A run resumed from folders without manifests."""

    run: Path
    """The folder that contains them."""
    folders: Mapping[str, Path]
    """role -> folder; without `ref` when the reference comes from a model. MindFormers' trainer saves the
    optimizer with the policy: then both are in one folder, and in one file."""
    ranks: int
    """How many ranks saved."""
    strategies: Mapping[str, Strategy]
    """role -> how its tensors were split over the ranks; roles whose tensors are whole are not in it."""
    reference_model: Path | None
    """Hugging Face folder of the reference model, when no checkpoint of it was saved."""
    model: Path
    """The model's config.json."""
    key_value_heads: int
    """The model's: the layout of MindFormers' concatenated projections depends on it."""
    position: Position
    """The newest complete one, as the files say."""
    first_epoch: int
    """The number of the first epoch in the files: 0 for MindRLHF, 1 for MindFormers' own trainer."""
    warnings: tuple[str, ...]


def is_foreign(source: CheckpointFolders) -> bool:
    """Whether these are folders of MindRLHF or MindFormers: no manifest, but a `meta.json`.

    One of policy, optimizer or reference is enough: if another is missing, `look` says what to write. One of
    our runs that lost its manifests looks like this too: `traces` tells it apart, and is checked first.
    """
    if not source.policy.is_dir() or positions(LocalStorage(source.run)):
        return False
    folders = (source.policy, source.optimizer, source.reference)
    return any((rank / META).is_file() for folder in folders for rank in folder.glob("rank_*"))


def look(
    source: CheckpointFolders,
    *,
    reference_named: str,
    reference_model: str,
    reference_is_synced: bool,
    model_folders: Iterable[str],
    own_strategies: Path,
    clears_own: bool = True,
    world_size: int,
) -> ForeignPlan:
    """Decide what to resume from. NothingToResume, CheckpointMismatch, ModelError or ConfigError.

    `reference_named` is what the user gave as --ref_checkpoint_path; `reference_model` the Hugging
    Face folder that the configuration names for the reference model, used when none was saved.
    `model_folders`: where the model's config.json may be, "" for none. `own_strategies`: the folder
    that this run writes its strategy files to.
    """
    ranks = sum(parse_rank(entry.name) is not None for entry in source.policy.iterdir())
    folders = {"policy_model": source.policy, "optimizer": source.optimizer}
    model, warnings, first_epoch = None, [], 0
    if not source.optimizer.is_dir():
        warnings.append(_all_in_one_file(source, ranks))
        folders["optimizer"], first_epoch = source.policy, 1
    if any(source.reference.glob("rank_*")):
        folders["ref"] = source.reference
    else:
        model, warning = _reference_model(source.reference, reference_named, reference_model)
        warnings.append(warning)
        if reference_is_synced:
            warnings.append(
                "ref_config.sync_ref_model is set: copies made before now are lost with that folder"
            )
    strategies = _split_roles(own_strategies, source.run, folders, ranks, clears_own=clears_own)
    if strategies:
        warnings += _about_joining(strategies, ranks, world_size)
    elif ranks != world_size:
        raise CheckpointMismatch(
            f"{source.policy} was saved by {ranks} workers and this run has {world_size}: resuming on "
            "another number of workers is not supported yet",
            hint=f"start with --workers {ranks}; if its tensors are split over the ranks, put the strategy "
            f"files of their trainer into {source.run / 'strategy'}",
        )
    model_config = _model_config(model_folders, source.policy)
    return ForeignPlan(
        run=source.run,
        folders=folders,
        ranks=ranks,
        strategies=strategies,
        reference_model=model,
        model=model_config,
        key_value_heads=_key_value_heads(model_config),
        position=find_foreign(folders, world_size=ranks).position,
        first_epoch=first_epoch,
        warnings=tuple(warnings),
    )


def _all_in_one_file(source: CheckpointFolders, ranks: int) -> str:
    """What to know about a folder of MindFormers' trainer; NothingToResume when it is not one."""
    if not _of_newest({"policy_model": source.policy}, ranks, _holds_moments):
        raise NothingToResume(
            f"{source.optimizer} does not exist: without the optimizer's moments, training cannot "
            "continue exactly",
            hint=f"MindRLHF writes it beside {source.policy.name}/: copy it there; to start over from "
            "the policy alone, convert it to a Hugging Face folder and leave --resume_training out",
        )
    return (
        f"{source.policy} holds policy and optimizer in one file, as MindFormers' trainer saves them: "
        "its epochs count from 1, and its positions name the last step that was done"
    )


def newest(folders: Mapping[str, Path], ranks: int, rejected: Mapping[Position, str]) -> ForeignCheckpoint:
    """`find_foreign` among positions not rejected; NothingToResume says why the others were."""
    try:
        return find_foreign(folders, world_size=ranks, skip=rejected)
    except NothingToResume as error:
        told = [f"  {position} rejected: {reason}" for position, reason in rejected.items()]
        raise NothingToResume("\n".join([error.message, *told]), hint=error.hint) from None


def _of_newest(folders: Mapping[str, Path], ranks: int, ask: Callable[[ForeignCheckpoint], _T]) -> _T:
    """What `ask` returns for the newest files that can be opened."""
    damaged: dict[Position, str] = {}
    while True:
        found = newest(folders, ranks, damaged)
        try:
            return ask(found)
        except CheckpointInvalid as error:
            damaged[found.position] = error.message


def _holds_moments(found: ForeignCheckpoint) -> bool:
    """Whether the policy's files hold an optimizer's moments."""
    return any(is_moment(name) for path in found.files["policy_model"] for name in read_layout(path))


def _split_roles(
    own: Path, run: Path, folders: Mapping[str, Path], ranks: int, *, clears_own: bool
) -> dict[str, Strategy]:
    """The strategies of the roles that have tensors split over ranks."""
    if ranks == 1:
        return {}
    places = [run / "strategy", run.parent / "strategy", own]
    strategies = {}
    for role in folders:
        found = find_strategy(place / inner for place in places for inner in (FOLDERS[role], "."))
        if found is not None:
            strategies[role] = found
    if not strategies:
        return {}

    def split(checkpoint: ForeignCheckpoint) -> dict[str, Strategy]:
        return {
            role: strategy
            for role, strategy in strategies.items()
            if is_split(checkpoint.files[role], strategy)
        }

    needed = _of_newest(folders, ranks, split)
    if clears_own and any(same_folder(strategy.folder, own) for strategy in needed.values()):
        raise ConfigError(
            f"{own} holds the strategy files by which the tensors in {run} are merged, and a start "
            "clears this run's own strategy folder",
            hint="name another one with --save_strategy_dir",
        )
    return needed


def _about_joining(strategies: Mapping[str, Strategy], ranks: int, world_size: int) -> Iterator[str]:
    places = ", ".join(dict.fromkeys(str(strategy.folder) for strategy in strategies.values()))
    yield f"tensors split over {ranks} ranks are merged by the strategy files in {places}"
    if ranks != world_size:
        yield (
            f"{ranks} workers saved, and this run has {world_size}: a step takes chunk_size x num_rollouts "
            "prompts for each worker, so choose chunk_size for a step to take as many as it did"
        )


def next_position(saved: Position, first_epoch: int, steps_per_epoch: int) -> Position:
    """The next step to run, from the position in a file's name; CheckpointMismatch when it does not exist.

    MindRLHF saves before the step that it names, as we do. Only its last checkpoint, made when all epochs
    are done, is named after the number of epochs and the steps per epoch. MindFormers saves after the step
    that it names, and counts epochs and steps from 1.
    """
    if saved.step > steps_per_epoch:
        raise CheckpointMismatch(
            f"the checkpoint was saved at step {saved.step} of an epoch, and an epoch has "
            f"{steps_per_epoch} steps now",
            hint="resume with the same dataset_file, chunk_size and num_rollouts",
        )
    if saved.epoch >= first_epoch > 0:
        return Position(*divmod((saved.epoch - first_epoch) * steps_per_epoch + saved.step, steps_per_epoch))
    return Position(saved.epoch, saved.step % steps_per_epoch)


def check_headers(source: ForeignPlan, layout: Layout) -> None:
    """CheckpointMismatch when the files' headers show that they belong to another model.

    For the plan, before anything slow is loaded: a worker compares everything with its model anyway.
    Damaged files are left for the worker to reject.
    """
    found = find_foreign(source.folders, world_size=source.ranks)
    files = []
    try:
        for role, paths in found.files.items():
            for name, header in _headers(paths, source.strategies.get(role)):
                files.append((name, assign(role, header, layout, source.key_value_heads)))
    except CheckpointInvalid:
        return
    refuse_misfits(found.position, files)


def _headers(
    paths: tuple[Path, ...], strategy: Strategy | None
) -> Iterator[tuple[str, Mapping[str, NDArray[Any]]]]:
    if strategy is not None:
        yield all_ranks(paths), joined_layout(paths, strategy)
        return
    for path in paths:
        yield path.name, read_layout(path)


def all_ranks(paths: Collection[Path]) -> str:
    """What an error calls the files of all ranks."""
    return f"{next(iter(paths)).name} and its like of {len(paths)} ranks"


def refuse_misfits(position: Position, files: Iterable[tuple[str, MappedTensors]]) -> None:
    """CheckpointMismatch, listing what is wrong in which file, if anything is."""
    lines = [f"  {name}: {problem}" for name, file in files for problem in file.problems]
    if not lines:
        return
    more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    hint = "resume with the config.json of the model that the run was started with"
    if any("a part of" in line for line in lines):
        hint = (
            "the files hold parts of tensors: put the strategy files of their trainer into strategy/ beside "
            "them, as MindRLHF and MindFormers write it"
        )
    raise CheckpointMismatch(
        "\n".join([f"the tensors of {position} do not fit the model:", *lines[:_LISTED], *more]), hint=hint
    )


def _reference_model(folder: Path, named: str, configured: str) -> tuple[Path, str]:
    """The Hugging Face folder used as reference when none was saved, and the warning that says so."""
    if named:
        if (Path(named) / CONFIG_FILE).is_file():
            return Path(named), f"the reference model is that of {named}, not one of the checkpoint's"
        raise NothingToResume(
            f"--ref_checkpoint_path {named}: no rank folders and no {CONFIG_FILE} there",
            hint="name the ref/ folder of the run, or the Hugging Face folder of its reference model",
        )
    if configured and (Path(configured) / CONFIG_FILE).is_file():
        return Path(configured), f"{folder} has no rank folders: the reference model is that of {configured}"
    raise NothingToResume(
        f"{folder} has no rank folders, and neither ref_config.load nor actor_config.load names a "
        "Hugging Face folder to take the reference model from",
        hint="name the folder of the model that the run was started from with --ref_checkpoint_path",
    )


def _model_config(folders: Iterable[str], policy: Path) -> Path:
    """The model's config.json; ModelError when nothing names one."""
    given = [Path(path) for path in folders if path]
    named = [path / CONFIG_FILE if path.is_dir() else path for path in given]
    for path in named:
        # MindRLHF's own model_config is a MindFormers YAML file, which uses other keys.
        if path.suffix == ".json" and path.is_file():
            return path
    looked = ", ".join(map(str, named)) or "nothing is named"
    raise ModelError(
        f"{policy} carries no {CONFIG_FILE}, and none was found elsewhere (looked at: {looked})",
        hint="name the model's Hugging Face folder with actor_config.model_config or actor_config.load",
    )


def _key_value_heads(model_config: Path) -> int:
    """The number of key-value heads, from the model's config.json; 1 when it mentions no heads."""
    try:
        content = read_input(model_config, _MOST_CONFIG)
    except OSError as error:
        raise ModelError(f"{model_config}: cannot be read: {error.strerror or error}") from None
    values = parse_model_config(content, model_config)
    heads = values.get("num_key_value_heads") or values.get("num_attention_heads")
    return heads if isinstance(heads, int) and heads > 0 else 1
