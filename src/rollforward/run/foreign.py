"""Going on from a folder that MindRLHF or MindFormers wrote: no manifests, other names, no digests.

    the plan      which position, is it for this many workers, where do model and reference come from
    a worker      reads every tensor of its rank, names it as we do, holds all of it against the model;
                  only then, and only when every worker could, is anything put into the engine

Nothing is written. A damaged file (cut short, or with values that are not finite) rejects its
position and the next older one is taken. A tensor that has no counterpart, is missing or has
another shape is a CheckpointMismatch that lists all of them.

Each worker must find every tensor whole in its own rank's files, as data-parallel training
leaves them. Left out: putting sharded files together. One rank's tensors are held in memory
once besides the engine's.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from rollforward.errors import CheckpointInvalid, CheckpointMismatch, ModelError, NothingToResume
from rollforward.grpo.ports import Engine, Tensors
from rollforward.position import Position
from rollforward.run.config import Config
from rollforward.run.folders import FromCheckpoint, parse_model_config
from rollforward.run.foreign_fit import Fitted, assign, fit
from rollforward.storage import LocalStorage
from rollforward.store.finding import positions
from rollforward.store.foreign_files import read_arrays, read_layout
from rollforward.store.layout import META, parse_rank
from rollforward.store.manifest import digest_of_arrays
from rollforward.store.mindformers_names import is_moment
from rollforward.store.mindrlhf import ForeignCheckpoint, find_foreign

CONFIG_FILE = "config.json"
_JOIN = "put the parts together with MindSpore's ms.transform_checkpoints first"
_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class FromForeign:
    """A run resumed from folders without manifests."""

    run: Path
    """The folder that holds them."""
    folders: Mapping[str, Path]
    """role -> folder; without `ref` when the reference comes from a model. MindFormers' trainer saves the
    optimizer with the policy: then both are in one folder, and in one file."""
    reference_model: Path | None
    """Hugging Face folder of the reference model, where no checkpoint of it was saved."""
    model: Path
    """The model's config.json."""
    key_value_heads: int
    """Of the model: how MindFormers' concatenated projections lie depends on it."""
    position: Position
    """The newest complete one, as the files have it."""
    first_epoch: int
    """What the files call the first epoch: 0 by MindRLHF, 1 by MindFormers' own trainer."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a worker put into its engine."""

    position: Position
    """As the files have it."""
    rejected: tuple[tuple[Position, str], ...]
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]
    """What the files hold besides, and nothing here needs: last parts of names."""
    role_bytes: Mapping[str, int]
    seconds: float


def is_foreign(source: FromCheckpoint) -> bool:
    """Whether these are folders of MindRLHF or MindFormers: no manifest, but somebody's `meta.json`."""
    if not source.policy.is_dir() or positions(LocalStorage(source.run)):
        return False
    return any((rank / META).is_file() for rank in source.policy.glob("rank_*"))


def look(
    config: Config, source: FromCheckpoint, *, reference_named: str, reference_model: str, world_size: int
) -> FromForeign:
    """Find out what to resume from. NothingToResume, CheckpointMismatch or ModelError.

    `reference_named` is what the user gave as --ref_checkpoint_path; `reference_model` the Hugging
    Face folder that the configuration names for the reference model, which serves when none is saved.
    """
    _check_world_size(source.policy, world_size)
    folders = {"policy_model": source.policy, "optimizer": source.optimizer}
    model, warnings, first_epoch = None, [], 0
    if not source.optimizer.is_dir():
        if not _holds_moments(source.policy, world_size):
            raise NothingToResume(
                f"{source.optimizer} does not exist: without the optimizer's moments, training cannot go on "
                "where it was",
                hint=f"MindRLHF writes it beside {source.policy.name}/: copy it there; to start anew from "
                "the policy alone, convert it to a Hugging Face folder and leave --resume_training out",
            )
        folders["optimizer"], first_epoch = source.policy, 1
        warnings.append(
            f"{source.policy} holds policy and optimizer in one file, as MindFormers' trainer saves them: "
            "its epochs count from 1, and its positions name the last step that was done"
        )
    if any(source.reference.glob("rank_*")):
        folders["ref"] = source.reference
    else:
        model, warning = _reference_model(source.reference, reference_named, reference_model)
        warnings.append(warning)
        if config.ref_config.sync_ref_model:
            warnings.append(
                "ref_config.sync_ref_model is set: copies made before now are lost with that folder"
            )
    found = find_foreign(folders, world_size=world_size)
    model_config = _model_config(config, source.policy)
    return FromForeign(
        run=source.run,
        folders=folders,
        reference_model=model,
        model=model_config,
        key_value_heads=_key_value_heads(model_config),
        position=found.position,
        first_epoch=first_epoch,
        warnings=tuple(warnings),
    )


def _holds_moments(folder: Path, world_size: int) -> bool:
    """Whether the newest files that open hold an optimizer's moments."""
    damaged: list[Position] = []
    while True:
        found = find_foreign({"policy_model": folder}, world_size=world_size, skip=damaged)
        try:
            return any(map(is_moment, read_layout(found.files["policy_model"][0])))
        except CheckpointInvalid:
            damaged.append(found.position)


def next_position(saved: Position, first_epoch: int, steps_per_epoch: int) -> Position:
    """The next step to run, from what a file is named after; CheckpointMismatch when there is no such step.

    MindRLHF saves before the step that it names, as we do. Only its last checkpoint, made when all
    epochs are over, is named after their number and the steps of one. MindFormers saves after the
    step that it names, and counts epochs and steps from 1.
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


def take(source: FromForeign, engine: Engine) -> Taken:
    """Read, check and put in place the newest position that can be read. Collective."""
    rejected: dict[Position, str] = {}
    while True:
        began = time.perf_counter()
        group = engine.group
        try:
            found = find_foreign(source.folders, world_size=group.world_size, skip=rejected)
        except NothingToResume as error:
            told = [f"  {position} rejected: {reason}" for position, reason in rejected.items()]
            raise NothingToResume("\n".join([error.message, *told]), hint=error.hint) from None
        state: dict[str, Fitted] = {}
        answer: dict[str, Any] = {"position": str(found.position), "damage": None, "mismatch": None}
        try:
            state = _read(found, engine.tensors(), source.key_value_heads, group.rank)
            answer["digests"] = {role: digest_of_arrays(file.tensors) for role, file in state.items()}
        except CheckpointInvalid as error:
            answer["damage"] = error.message
        except CheckpointMismatch as error:
            answer["mismatch"] = [error.message, error.hint]
        reason = _verdict(group.all_gather(answer))
        if reason is None:
            for role, file in state.items():
                for name, array in file.tensors.items():
                    engine.load(role, name, array)
            return Taken(
                position=found.position,
                rejected=tuple(sorted(rejected.items(), reverse=True)),
                warnings=(*source.warnings, *found.warnings, *_about_projections(state)),
                left_out=tuple(sorted({name for file in state.values() for name in file.left_out})),
                role_bytes={r: sum(a.nbytes for a in file.tensors.values()) for r, file in state.items()},
                seconds=time.perf_counter() - began,
            )
        rejected[found.position] = reason


def _about_projections(state: Mapping[str, Fitted]) -> list[str]:
    if not any(file.concatenated for file in state.values()):
        return []
    return [
        "w_qkv and w_gate_hidden are taken to lie as MindFormers 1.5 and later has them; if this was "
        "written by 1.4.0-beta1 or older, take them apart with that version first"
    ]


def _verdict(answers: list[dict[str, Any]]) -> str | None:
    """None when all workers have the same whole state; why the position is rejected; CheckpointMismatch."""
    where = [f"rank {rank}: " if len(answers) > 1 else "" for rank in range(len(answers))]
    for rank, answer in enumerate(answers):
        if answer["damage"] is not None:
            return f"{where[rank]}{answer['damage']}"
    for rank, answer in enumerate(answers):
        if answer["mismatch"] is not None:
            message, hint = answer["mismatch"]
            raise CheckpointMismatch(f"{where[rank]}{message}", hint=hint)
    for rank, answer in enumerate(answers):
        if (answer["position"], answer["digests"]) != (answers[0]["position"], answers[0]["digests"]):
            raise CheckpointMismatch(
                f"ranks 0 and {rank} hold different tensors of {answers[0]['position']}: "
                "that is not data-parallel training, where all hold the same",
                hint=_JOIN,
            )
    return None


def _read(found: ForeignCheckpoint, wanted: Tensors, groups: int, rank: int) -> dict[str, Fitted]:
    """Every tensor of one rank under our names, in our dtypes; CheckpointMismatch lists what does not fit."""
    paths = {role: files[rank] for role, files in found.files.items()}
    state: dict[str, Fitted] = {}
    read: tuple[Path | None, dict[str, NDArray[Any]]] = (None, {})
    for role, path in paths.items():
        if read[0] != path:  # policy and optimizer may be one file
            read = path, dict(read_arrays(path))
        state[role] = fit(role, read[1], wanted, groups)
    _refuse(found.position, [(paths[role].name, file) for role, file in state.items()])
    return state


def check_headers(source: FromForeign, layout: Tensors, *, world_size: int) -> None:
    """CheckpointMismatch when the headers of the files say that they are of another model.

    For the plan, before anything slow is loaded: a worker holds everything against its model anyway.
    Damaged files are left for the worker to reject.
    """
    found = find_foreign(source.folders, world_size=world_size)
    files = []
    for role, paths in found.files.items():
        for path in paths:
            try:
                header = read_layout(path)
            except CheckpointInvalid:
                return
            files.append((path.name, assign(role, header, layout, source.key_value_heads)))
    _refuse(found.position, files)


def _refuse(position: Position, files: Iterable[tuple[str, Fitted]]) -> None:
    """CheckpointMismatch, with what is wrong in which file, unless nothing is."""
    lines = [f"  {name}: {problem}" for name, file in files for problem in file.problems]
    if not lines:
        return
    more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    hint = "resume with the config.json of the model that the run was started with"
    if any("a part of" in line for line in lines):
        hint = f"sharded files are not supported yet: {_JOIN}"
    raise CheckpointMismatch(
        "\n".join([f"the tensors of {position} do not fit the model:", *lines[:_LISTED], *more]), hint=hint
    )


def _check_world_size(policy: Path, world_size: int) -> None:
    ranks = [entry for entry in policy.iterdir() if parse_rank(entry.name) is not None]
    if len(ranks) != world_size:
        raise CheckpointMismatch(
            f"{policy} was saved by {len(ranks)} workers and this run has {world_size}: resuming on another "
            "number of workers is not supported yet",
            hint=f"start with --workers {len(ranks)}",
        )


def _reference_model(folder: Path, named: str, configured: str) -> tuple[Path, str]:
    """The Hugging Face folder that serves as reference where none was saved, and the warning that says so."""
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


def _model_config(config: Config, policy: Path) -> Path:
    """The config.json of the model; ModelError when nothing names one."""
    actor = config.actor_config
    given = [Path(path) for path in (actor.model_config, actor.load, config.rl_config.tokenizer_dir) if path]
    named = [path / CONFIG_FILE if path.is_dir() else path for path in given]
    for path in named:
        # MindRLHF's own model_config is a YAML of MindFormers, which says it in other words.
        if path.suffix == ".json" and path.is_file():
            return path
    looked = ", ".join(map(str, named)) or "nothing is named"
    raise ModelError(
        f"{policy} carries no {CONFIG_FILE}, and none was found elsewhere (looked at: {looked})",
        hint="name the model's Hugging Face folder with actor_config.model_config or actor_config.load",
    )


def _key_value_heads(model_config: Path) -> int:
    """How many heads keys have, by the model's config.json; 1 where it speaks of no heads."""
    values = parse_model_config(model_config.read_bytes(), model_config)
    heads = values.get("num_key_value_heads") or values.get("num_attention_heads")
    return heads if isinstance(heads, int) and heads > 0 else 1
