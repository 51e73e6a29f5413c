"""The example's run, as `scripts/demo` makes it, but shorter: trained by MindSpore, killed, resumed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rollforward.replay.metrics import FILE, read

ROOT = Path(__file__).resolve().parents[2]
ARITHMETIC = ROOT / "examples" / "arithmetic"
PROGRAM = [sys.executable, "-m", "rollforward.cli.main"]
PATIENCE = 300.0
STEPS = 24
KILLS = (7, 16)
"""Steps after which it is killed."""


def start(folder: Path, *, steps: int, resume: bool, **options: object) -> "subprocess.Popen[bytes]":
    """`rollforward train` in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*PROGRAM, "train", "--config", str(ARITHMETIC / "grpo.yaml")]
    command += ["--save_checkpoint_dir", str(folder / "run"), "--save_strategy_dir", str(folder / "strategy")]
    settings = {"rl_config.max_steps": steps, "rl_config.save_ckpt_interval": 5, **options}
    command += [f"--set={key}={value}" for key, value in settings.items()]
    command += ["--resume_training"] if resume else ["--actor_checkpoint_path", str(ARITHMETIC / "model")]
    with (folder / "train.log").open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | {"LOCAL_DEFAULT_PATH": str(folder)}
        )


def wait_for_step(folder: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    """Until the figures of a step are there."""
    wait(lambda: _steps(folder) > step or process.poll() is not None)
    assert _steps(folder) > step, (folder / "train.log").read_text()[-3000:]


def kill_at(folder: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL, when the figures of a step are there."""
    wait_for_step(folder, step, process)
    process.send_signal(signal.SIGKILL)
    process.wait()


def wait(until: Callable[[], bool]) -> None:
    """Until something holds, for as long as a busy machine may need."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _steps(folder: Path) -> int:
    path = folder / "run" / FILE
    return len(read(path)) if path.exists() else 0
