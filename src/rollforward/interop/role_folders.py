"""The folders `train/`, `optimizer/` and `ref/` of a run, as the command line names them.

MindRLHF's names, and ours: a resumed run starts from `train/` and `ref/` of an earlier run; their parent
is the earlier run's folder.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from rollforward.errors import NothingToResume
from rollforward.store.layout import COMMITS, ROLE_FOLDERS


@dataclass(frozen=True, kw_only=True)
class CheckpointFolders:
    """The role folders of a run to resume."""

    policy: Path
    """`train/` of the earlier run."""
    optimizer: Path
    reference: Path

    @property
    def run(self) -> Path:
        """The earlier run's folder."""
        return self.policy.parent


def name_checkpoint_folders(actor: str, reference: str, default_run: Path) -> CheckpointFolders:
    """The folders to resume from; `train/` and `ref/` of `default_run` if they are not named.

    A run's folder stands for its `train/` and `ref/`. Whether they exist is not checked.
    """
    if actor:
        policy = _role_folder(Path(actor), "policy_model")
    else:
        policy = default_run / ROLE_FOLDERS["policy_model"]
    if reference:
        ref = _role_folder(Path(reference), "ref")
    else:
        ref = policy.parent / ROLE_FOLDERS["ref"]
    return CheckpointFolders(
        policy=policy, optimizer=policy.parent / ROLE_FOLDERS["optimizer"], reference=ref
    )


def checkpoint_folders(actor: str, reference: str, default_run: Path) -> CheckpointFolders:
    """`name_checkpoint_folders`, and NothingToResume when one does not exist."""
    found = name_checkpoint_folders(actor, reference, default_run)
    for option, folder in (("actor", found.policy), ("ref", found.reference)):
        if not folder.is_dir():
            raise NothingToResume(
                f"--{option}_checkpoint_path {folder}: no such folder\n{what_is_near(folder)}",
                hint="check the path and $LOCAL_DEFAULT_PATH "
                f"({os.environ.get('LOCAL_DEFAULT_PATH') or 'not set'}); "
                "a new run is started without --resume_training",
            )
    return found


def _role_folder(path: Path, role: str) -> Path:
    """`path`, or the role's folder inside it when `path` is a run's folder."""
    inner = path / ROLE_FOLDERS[role]
    if path.name != ROLE_FOLDERS[role] and (inner.is_dir() or (path / COMMITS).is_dir()):
        return inner
    return path


def what_is_near(folder: Path) -> str:
    """The nearest existing parent folder, and what is in it: one line."""
    near = next(part for part in (folder, *folder.absolute().parents) if part.is_dir())
    try:
        there = ", ".join(sorted(entry.name for entry in near.iterdir())[:10])
    except OSError as error:
        return f"{near} exists and cannot be read: {error.strerror}"
    return f"{near} exists and holds {there or 'nothing'}"
