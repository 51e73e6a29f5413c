"""Which folders a run writes to: from the configuration and `$LOCAL_DEFAULT_PATH`.

    <root>/save_ckpt    checkpoints, metrics, heartbeats: the run's folder      --save_checkpoint_dir
    <root>/strategy     strategy_<rank>.ckpt                                    --save_strategy_dir
    <root>/log          the log of the run, and those of its workers

A run may be in object storage instead (`s3://bucket/path`). Then what is only of this machine, such as
heartbeats and compiled graphs, is in a working folder.

`<root>` is `$LOCAL_DEFAULT_PATH`, or `./output` without it. If `strategy` or `log` belongs to another run,
the run uses `strategy.1`, `log.1` and so on (`run.output_folders`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rollforward.config.keys import Config
from rollforward.errors import ConfigError
from rollforward.storage.address import default_work_dir, is_remote, local_path

ROOT_VARIABLE = "LOCAL_DEFAULT_PATH"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run writes."""

    run: Path
    """The run's folder; of one in object storage, this machine's working folder, where nothing lasting is."""
    strategy: Path
    log: Path
    tensorboard: Path | None
    """None: no event files."""
    named: frozenset[str] = frozenset()
    """Which of `strategy` and `tensorboard` the user named. The others may already belong to another run:
    then the run uses a folder of its own beside it."""
    address: str = ""
    """Where a run in object storage is; "" for one in a folder."""

    @property
    def where(self) -> str:
        """The run's folder or address, for people."""
        return self.address or str(self.run)


def outputs(config: Config, environment: Mapping[str, str] = os.environ) -> Outputs:
    """The folders that a run writes to. They need not exist."""
    root = Path(os.path.expanduser(environment.get(ROOT_VARIABLE) or "output"))  # noqa: PTH111 - no error
    if str(root).startswith("~"):
        raise ConfigError(f"${ROOT_VARIABLE} is {root}: no such home folder", hint="name the folder itself")
    save = config.actor_config.save
    address = save if is_remote(save) else ""
    if address:
        work = config.rl_config.work_dir
        run = Path(work).expanduser() if work else default_work_dir(address)
    else:
        run = local_path(save) if save else root / "save_ckpt"
    tensorboard = Path(config.rl_config.tensorboard_dir or run / "tensorboard")
    found = Outputs(
        run=run,
        strategy=Path(config.rl_config.save_strategy_dir or root / "strategy"),
        log=root / "log",
        tensorboard=tensorboard if config.rl_config.tensorboard else None,
        named=frozenset(
            name
            for name, given in (
                ("strategy", config.rl_config.save_strategy_dir),
                ("tensorboard", config.rl_config.tensorboard_dir),
            )
            if given
        ),
        address=address,
    )
    for folder in (found.run, found.strategy, found.log):
        blocking = next((part for part in (folder, *folder.parents) if part.exists()), None)
        if blocking is not None and not blocking.is_dir():
            raise ConfigError(
                f"{folder} must be a folder, but {blocking} is a file", hint="name another place"
            )
    return found
