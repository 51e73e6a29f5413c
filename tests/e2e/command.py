"""Runs `rollforward` as a user does: another process, real MindSpore, a real kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rollforward.processes import heartbeat
from rollforward.replay import report as recovery_report
from rollforward.replay.metrics import FILE, read
from rollforward.storage import LocalStorage

ROOT = Path(__file__).resolve().parents[2]
ARITHMETIC = ROOT / "examples" / "arithmetic"
SETTINGS = {
    "rl_config.dataset_file": ARITHMETIC / "train.jsonl",
    # One prompt to a chunk: batches of few shapes, since each is a graph to compile.
    "rl_config.chunk_size": 1,
    "rl_config.num_rollouts": 2,
    "rl_config.num_generations": 4,
    "rl_config.batch_size": 4,
    "rl_config.max_steps": 6,
    "rl_config.save_ckpt_interval": 2,
    "actor_config.lr_schedule.lr": 0.001,
    "generate_config.max_prompt_length": 6,
    "generate_config.sampling_config.max_tokens": 8,
}
CUT = SETTINGS | {"actor_config.parallel_config.model_parallel": 2}
UNCUT = SETTINGS | {"actor_config.parallel_config.model_parallel": 1}
WORKER_DIES = Path(__file__).with_name("worker_dies.py")
PROGRAM = [sys.executable, "-m", "rollforward.cli.main"]
SPREAD = "actor_config.enable_parallel_optimizer"


def torn_down(said: str) -> bool:
    """Whether all that went wrong is that a worker, its work done, crashed in MindSpore's exit handlers.

    Seen in MindSpore 2.10 on the CPU, about once in ten runs, in a program that does nothing but gather a
    number; `msrun` then exits with 1. What the run saved is held against its twin by the tests all the same.
    """
    return "exit with exception. Error code: -11" in said


@dataclass
class Command:
    """`rollforward train` of one run in a folder of its own."""

    folder: Path
    workers: int = 1
    max_restarts: int = 0
    min_workers: int = 0
    standby: bool = False
    program: list[str] = field(default_factory=lambda: [*PROGRAM, "train"])
    settings: dict[str, object] = field(default_factory=lambda: dict(SETTINGS))
    model: Path = ARITHMETIC / "model"

    @property
    def run(self) -> Path:
        return self.folder / "save_ckpt"

    def arguments(self, *, resume: bool) -> list[str]:
        found = [f"--set={key}={value}" for key, value in self.settings.items()]
        found += [
            "--save_checkpoint_dir",
            str(self.run),
            "--save-strategy-dir",
            str(self.folder / "strategy"),
        ]
        if resume:
            found += ["--resume_training", "--actor_checkpoint_path", str(self.run / "train")]
            found += ["--ref_checkpoint_path", str(self.run / "ref")]
        else:
            found += ["--actor_checkpoint_path", str(self.model)]
        found += ["--max_restarts", str(self.max_restarts)] if self.max_restarts else []
        found += ["--min_workers", str(self.min_workers)] if self.min_workers else []
        found += ["--standby"] if self.standby else []
        return found if self.workers == 1 else [*found, "--workers", str(self.workers)]

    def start(
        self, *, resume: bool = False, log: str = "train.txt", errors: str = ""
    ) -> "subprocess.Popen[bytes]":
        """`log`: a file in the folder, or a path; `errors`: the same of standard error, if it is another."""
        self.folder.mkdir(exist_ok=True)
        # msrun starts whatever `python` is: the one of these tests.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = dict(os.environ, LOCAL_DEFAULT_PATH=str(self.folder), PATH=path)
        with (self.folder / log).open("wb") as output, (self.folder / (errors or log)).open("ab") as second:
            return subprocess.Popen(
                [*self.program, *self.arguments(resume=resume)],
                cwd=self.folder,
                env=environment,
                stdout=output,
                stderr=second if errors else subprocess.STDOUT,
            )

    def take_graphs(self, other: "Command") -> None:
        """Begin with what another run compiled, too; compiling is most of the time of these tests."""
        shutil.copytree(other.run / "compile_cache", self.run / "compile_cache", dirs_exist_ok=True)

    def finish(self, *, resume: bool = False, log: str = "train.txt") -> str:
        """Run to the end; returns what was said."""
        return self.ended(self.start(resume=resume, log=log), log=log)

    def ended(self, process: "subprocess.Popen[bytes]", code: int = 0, log: str = "train.txt") -> str:
        """Wait for its end; returns what was said. A failure shows that, and what the workers said."""
        found = process.wait(timeout=600)
        said = (self.folder / log).read_text()
        assert found == code or (code == 0 and torn_down(said)), f"ended with {found}\n{said}{self._logs()}"
        return said

    def _logs(self) -> str:
        """The ends of the logs of the workers."""
        files = sorted((self.folder / "log").rglob("*.log"))
        return "".join(f"\n--- {file.name} ---\n{file.read_text(errors='replace')[-4000:]}" for file in files)

    def with_a_worker_that_dies(self, rank: int, phase: str, position: str) -> None:
        """Run until a worker kills itself where it enters a phase of a step: SIGKILL."""
        dying = replace(self, program=[sys.executable, str(WORKER_DIES), str(rank), phase, position, "1"])
        process = dying.start()
        assert process.wait(timeout=1800) != 0, (self.folder / "train.txt").read_text()
        pulse = heartbeat.read(self.run, rank)
        assert pulse is not None
        assert (pulse.phase, pulse.position) == (phase, position), (self.folder / "train.txt").read_text()

    def kill_inside(self, process: "subprocess.Popen[bytes]", phase: str, step: int, rank: int = 0) -> None:
        """SIGKILL a worker while it is inside a phase of that step or a later one."""
        while True:
            pulse = self.wait_until_inside(process, phase, step, rank)
            os.kill(pulse.pid, signal.SIGSTOP)
            if heartbeat.read(self.run, rank) == pulse:
                os.kill(pulse.pid, signal.SIGKILL)
                return
            os.kill(pulse.pid, signal.SIGCONT)

    def wait_until_inside(
        self, process: "subprocess.Popen[bytes]", phase: str, step: int, rank: int = 0
    ) -> heartbeat.Pulse:
        """Come back when a worker is inside a phase of that step or a later one."""
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and process.poll() is None:
            pulse = heartbeat.read(self.run, rank)
            if pulse is not None and pulse.phase == phase and int(pulse.position.split("_")[1]) >= step:
                return pulse
            time.sleep(0.005)
        raise AssertionError((self.folder / "train.txt").read_text())

    def copied(self, folder: Path, **changes: Any) -> "Command":
        """The same run in another folder."""
        shutil.copytree(self.run, folder / "save_ckpt")
        return replace(self, folder=folder, **changes)

    def newest(self) -> dict[str, Any]:
        """The newest checkpoint, as `rollforward inspect --deep --json` has it."""
        checkpoint = self.checkpoints()[-1]
        assert checkpoint["valid"], checkpoint["reason"]
        return checkpoint

    def checkpoints(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        command = [*PROGRAM, "inspect", str(self.run), "--deep", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: list[dict[str, Any]] = json.loads(done.stdout)["checkpoints"]
        return found

    def figures(self) -> list[dict[str, float]]:
        """Metrics without what the clock and the disk say."""
        clock, elsewhere = ("incarnation", "time", "tokens_per_second"), ("seconds/", "saves_")
        return [
            {
                key: value
                for key, value in record.items()
                if key not in clock and not key.startswith(elsewhere)
            }
            for record in read(self.run / FILE)
        ]


def figures_of(command: Command) -> tuple[object, list[dict[str, float]]]:
    """What has to be the same: the digest of every role, and the metrics."""
    return command.newest()["digests"], command.figures()


def assert_nothing_finished_was_lost(command: Command) -> None:
    for report in recovery_report.read(LocalStorage(command.run)):
        assert (report.lost, report.rejected, report.chunks_generated_again) == ((), {}, 0)
        assert report.updates_repeated == report.updates_replayed


def begun(command: Command) -> bool:
    return any((command.run / "commits").glob("*.json"))
