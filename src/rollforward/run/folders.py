"""Which folders a run reads and writes: from options, configuration and `$LOCAL_DEFAULT_PATH`.

    <root>/save_ckpt    checkpoints, metrics, heartbeats: the run's folder      --save_checkpoint_dir
    <root>/strategy     strategy_<rank>.ckpt                                    --save_strategy_dir
    <root>/log          what was said, and what workers said

`<root>` is `$LOCAL_DEFAULT_PATH`, or `./output` without it.

A new run starts from Hugging Face folders. A resumed run starts from the `train/` and `ref/`
folders of an earlier one, whose parent is the earlier run's folder.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollforward.errors import ConfigError, ModelError, NothingToResume
from rollforward.run.config import Config
from rollforward.store.layout import COMMITS, ROLE_FOLDERS

ROOT_VARIABLE = "LOCAL_DEFAULT_PATH"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What of a Hugging Face folder a run keeps beside its checkpoints, so that a resume needs no such folder."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run writes."""

    run: Path
    strategy: Path
    log: Path
    tensorboard: Path | None
    """None: no event files."""


@dataclass(frozen=True, kw_only=True)
class FromModel:
    """A new run, from Hugging Face folders."""

    policy: Path
    reference: Path


@dataclass(frozen=True, kw_only=True)
class FromCheckpoint:
    """A resumed run, from folders of checkpoints."""

    policy: Path
    """`train/` of the earlier run."""
    optimizer: Path
    reference: Path

    @property
    def run(self) -> Path:
        """The earlier run's folder."""
        return self.policy.parent


def outputs(config: Config, environment: Mapping[str, str] = os.environ) -> Outputs:
    """The folders that a run writes to. None of them need exist."""
    root = Path(environment.get(ROOT_VARIABLE) or "output")
    run = Path(config.actor_config.save or root / "save_ckpt")
    tensorboard = Path(config.rl_config.tensorboard_dir or run / "tensorboard")
    found = Outputs(
        run=run,
        strategy=Path(config.rl_config.save_strategy_dir or root / "strategy"),
        log=root / "log",
        tensorboard=tensorboard if config.rl_config.tensorboard else None,
    )
    for folder in (found.run, found.strategy, found.log):
        blocking = next((part for part in (folder, *folder.parents) if part.exists()), None)
        if blocking is not None and not blocking.is_dir():
            raise ConfigError(
                f"{folder} is to be a folder, but {blocking} is a file", hint="name another place"
            )
    return found


def model_folders(actor: str, reference: str) -> FromModel:
    """The Hugging Face folders of a new run; the reference is the actor's when it is not named.

    Raises ConfigError when no actor is named, ModelError when a folder is none of Hugging Face's.
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
    if (folder / "config.json").is_file():
        return
    if any(folder.glob("rank_*")) or (folder / COMMITS).is_dir():
        raise ModelError(
            f"{name}: this is a folder of checkpoints, not a Hugging Face folder",
            hint="to go on from a checkpoint add --resume_training",
        )
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    raise ModelError(
        f"{name}: no config.json there; there is {there}",
        hint="name a Hugging Face folder: config.json, *.safetensors, tokenizer.json",
    )


def name_checkpoint_folders(actor: str, reference: str, default_run: Path) -> FromCheckpoint:
    """The folders to resume from; `train/` and `ref/` of `default_run` where they are not named.

    A run's folder is taken for its `train/` and `ref/`. Whether they exist is not looked at.
    """
    if actor:
        policy = _role_folder(Path(actor), "policy_model")
    else:
        policy = default_run / ROLE_FOLDERS["policy_model"]
    if reference:
        ref = _role_folder(Path(reference), "ref")
    else:
        ref = policy.parent / ROLE_FOLDERS["ref"]
    return FromCheckpoint(policy=policy, optimizer=policy.parent / ROLE_FOLDERS["optimizer"], reference=ref)


def checkpoint_folders(actor: str, reference: str, default_run: Path) -> FromCheckpoint:
    """`name_checkpoint_folders`, and NothingToResume when one does not exist."""
    found = name_checkpoint_folders(actor, reference, default_run)
    for option, folder in (("actor", found.policy), ("ref", found.reference)):
        if not folder.is_dir():
            raise NothingToResume(
                f"--{option}_checkpoint_path {folder}: no such folder\n{what_is_near(folder)}",
                hint=f"check the path and ${ROOT_VARIABLE} ({os.environ.get(ROOT_VARIABLE) or 'not set'}); "
                "a new run is started without --resume_training",
            )
    return found


def _role_folder(path: Path, role: str) -> Path:
    """`path`, or the role's folder in it when `path` is a run's folder."""
    inner = path / ROLE_FOLDERS[role]
    if path.name != ROLE_FOLDERS[role] and (inner.is_dir() or (path / COMMITS).is_dir()):
        return inner
    return path


def what_is_near(folder: Path) -> str:
    """The nearest folder above that exists, and what is in it: one line."""
    near = next(part for part in (folder, *folder.absolute().parents) if part.is_dir())
    there = ", ".join(sorted(entry.name for entry in near.iterdir())[:10])
    return f"{near} exists and holds {there or 'nothing'}"


def parse_model_config(content: bytes, path: Path) -> dict[str, Any]:
    """A parsed `config.json`; ModelError, naming `path`, when it is no JSON object."""
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}", hint="download the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object", hint="is it a model's config.json?")
    return value


def model_files(model: Path, tokenizer: Path) -> dict[str, bytes]:
    """The small files that a run keeps: name -> content.

    `config.json` is the model's, the others are the tokenizer's. ModelError when one cannot be read.
    """
    found: dict[str, bytes] = {}
    for name in MODEL_FILES:
        path = (model if name == "config.json" else tokenizer) / name
        try:
            if path.is_file():
                found[name] = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    return found
