"""Which folders a run writes to: from the configuration and `$LOCAL_DEFAULT_PATH`.

    <root>/save_ckpt    checkpoints, metrics, heartbeats: the run's folder      --save_checkpoint_dir
    <root>/strategy     strategy_<rank>.ckpt                                    --save_strategy_dir
    <root>/log          the log of the run, and those of its workers

`<root>` is `$LOCAL_DEFAULT_PATH`, or `./output` without it. If `strategy` or `log` belongs to another run,
the run uses `strategy.1`, `log.1` and so on (`run.output_folders`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rollforward.config.keys import Config
from rollforward.errors import ConfigError

ROOT_VARIABLE = "LOCAL_DEFAULT_PATH"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where a run writes."""

    run: Path
    strategy: Path
    log: Path
    tensorboard: Path | None
    """None: no event files."""
    named: frozenset[str] = frozenset()
    """Which of `strategy` and `tensorboard` the user named. The others may already belong to another run:
    then the run uses a folder of its own beside it."""


def outputs(config: Config, environment: Mapping[str, str] = os.environ) -> Outputs:
    """The folders that a run writes to. They need not exist."""
    root = Path(os.path.expanduser(environment.get(ROOT_VARIABLE) or "output"))  # noqa: PTH111 - no error
    if str(root).startswith("~"):
        raise ConfigError(f"${ROOT_VARIABLE} is {root}: no such home folder", hint="name the folder itself")
    run = Path(config.actor_config.save or root / "save_ckpt")
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
    )
    for folder in (found.run, found.strategy, found.log):
        blocking = next((part for part in (folder, *folder.parents) if part.exists()), None)
        if blocking is not None and not blocking.is_dir():
            raise ConfigError(
                f"{folder} must be a folder, but {blocking} is a file", hint="name another place"
            )
    return found
