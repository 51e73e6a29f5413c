"""A checkpoint as TRL's own `checkpoint-N`: what `trl.GRPOTrainer` resumes from.

    model.safetensors with config.json, or adapter_model.safetensors with adapter_config.json; the tokenizer
    optimizer.pt, scheduler.pt, scaler.pt, rng_state.pth or rng_state_RANK.pth, trainer_state.json

Lost there is what TRL does not keep: rollouts between two generations, a reference that follows the policy,
the order of the data after epoch 0. The .pt files are PyTorch's, made for others; nothing here reads them.
"""

import io
from pathlib import Path
from typing import Any

import torch

from rollforward.errors import CheckpointMismatch
from rollforward.interop.exporting import export_huggingface
from rollforward.position import Position
from rollforward.storage import LocalStorage, Storage
from rollforward.store import Manifest, find, load_manifest, read_tensors
from rollforward.torch.arrays import Arrays
from rollforward.torch.optimizers import optimizer_state_dict
from rollforward.torch.randomness import generator_states
from rollforward.trl.progress import CLOCK, TRAINER, Progress
from rollforward.trl.session import OPTIMIZER, STATE_FILE


def export_checkpoint(run: str | Path, folder: str | Path, step: int | None = None) -> list[str]:
    """Write the checkpoint at a step (None: the newest) into a folder; returns the names of its files.

    CheckpointMismatch for a run of another trainer; StorageError, CheckpointInvalid, NothingToResume.
    """
    storage = LocalStorage(Path(run).expanduser())
    manifest = find(storage).manifest if step is None else load_manifest(storage, Position(0, step))
    return export_trl(storage, manifest, LocalStorage(Path(folder).expanduser()))


def export_trl(storage: Storage, manifest: Manifest, out: Storage) -> list[str]:
    """The same for a manifest; an `interop.exporting.Export`. `trainer_state.json` is written last."""
    roles: dict[str, Arrays] = {OPTIMIZER: {}, TRAINER: {}, CLOCK: {}}
    for role, name, array in read_tensors(storage, manifest, roles):
        roles[role][name] = array
    if not roles[TRAINER]:
        raise CheckpointMismatch(
            f"checkpoint {manifest.position} is not of a run of rollforward.trl",
            hint="--format huggingface exports the policy of any run",
        )
    ranks = [Progress(roles, rank) for rank in range(manifest.world_size)]
    first = ranks[0]
    others: dict[str, Any] = {
        "optimizer.pt": optimizer_state_dict(roles[OPTIMIZER], first.groups),
        "scheduler.pt": first.scheduler,
    }
    if first.scaler is not None:
        others["scaler.pt"] = first.scaler
    for number, each in enumerate(ranks):
        name = f"rng_state_{number}.pth" if len(ranks) > 1 else "rng_state.pth"
        others[name] = generator_states(each.random)
    written = export_huggingface(storage, manifest, out)
    for name, value in others.items():
        content = io.BytesIO()
        torch.save(value, content)
        out.write(name, [content.getvalue()])
    out.write(STATE_FILE, [first.trainer_state()])
    return [*written, *others, STATE_FILE]
