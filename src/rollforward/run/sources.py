"""Where a new run takes its first weights from: Hugging Face folders."""

from dataclasses import dataclass
from pathlib import Path

from rollforward.errors import ConfigError, ModelError
from rollforward.store.layout import COMMITS

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
class FromModel:
    """A new run, from Hugging Face folders."""

    policy: Path
    reference: Path


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
