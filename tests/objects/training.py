"""Trainers with the toy engine, as processes of their own, whose run is in a real object store."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import toy_trainer
from toy_session import Place

from rollforward.cli.main import main
from rollforward.replay import report
from rollforward.replay.metrics import read_from
from rollforward.storage.address import open_storage
from rollforward.store import find
from rollforward.store.catalog import named_positions
from rollforward.store.restoring import content_digests

TRAINER = str(Path(toy_trainer.__file__))
LEASE_SECONDS = 2


@dataclass
class Training:
    """A run at an address. `machine` names a home of its own for each machine that it is on."""

    place: Place
    address: str
    changes: dict[str, Any] = field(default_factory=dict)
    machine: str = "one"
    logs: list[str] = field(default_factory=list)
    """What the trainers printed that have ended."""

    def start(self, machine: str | None = None, more: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """A trainer, which goes on if there is something to go on from."""
        changes = {
            "context__engine": "toy",
            "actor_config__save": self.address,
            "rl_config__lease_seconds": LEASE_SECONDS,
            "rl_config__save_strategy_dir": str(self.home(machine) / "strategy"),
            **self.changes,
        }
        command = [sys.executable, TRAINER, *toy_trainer.arguments(self.place, "unused", **changes), *more]
        if named_positions(open_storage(self.address)):
            command.append("--resume_training")
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.place.root,
            env={**os.environ, "XDG_CACHE_HOME": str(self.home(machine))},
        )

    def home(self, machine: str | None = None) -> Path:
        return self.place.root / f"cache-{machine or self.machine}"

    def until(self, trainer: "subprocess.Popen[str]", words: str) -> None:
        """Wait until the trainer has printed a line with these words, or has ended."""
        assert trainer.stdout is not None
        for line in trainer.stdout:
            self.logs.append(line)
            if words in line:
                return

    def kill(self, trainer: "subprocess.Popen[str]") -> bool:
        """SIGKILL; whether it was still running."""
        alive = trainer.poll() is None
        trainer.send_signal(signal.SIGKILL)
        self.logs.append(trainer.communicate()[0])
        return alive

    def finish(self, trainer: "subprocess.Popen[str] | None" = None) -> None:
        """To the end of the run."""
        trainer = trainer or self.start()
        self.logs.append(trainer.communicate(timeout=600)[0])
        assert trainer.returncode == 0, self.log[-3000:]

    @property
    def log(self) -> str:
        return "".join(self.logs)

    def check(self, digests: dict[str, str], steps: int) -> None:
        """The run ended with these digests, all in the bucket is intact, and each step has its line."""
        storage = open_storage(self.address)
        assert content_digests(storage, find(storage).manifest) == digests
        assert main(["verify", "--deep", self.address]) == 0
        assert [record["global_step"] for record in read_from(storage)] == list(range(steps))

    def generated_again(self) -> int:
        """Chunks, over all recoveries."""
        return sum(each.chunks_generated_again for each in report.read(open_storage(self.address)))
