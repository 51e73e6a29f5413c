"""Looking at a run that saves and prunes meanwhile reports no damage, and what is really damaged still is."""

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from journal_case import identity

from rollforward.cli.main import main
from rollforward.errors import NothingToResume
from rollforward.inspection.comparing import CheckpointGone, diff
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Retention, RunLock, find, list_checkpoints
from rollforward.store.journal.reading import JournalView
from rollforward.store.journal.writing import Journal

LOOKS = 12
STEPS = 3
"""That the trainer does at least while it is looked at, however slow the machine is."""


class Trainer(threading.Thread):
    """Saves a checkpoint a step as fast as it can, keeps two, prunes the journal, and changes attachments."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.storage = LocalStorage(run)
        self.lock = RunLock.acquire(run)
        self.store = CheckpointStore(self.storage, retention=Retention(newest=2))
        self.journal = Journal(self.storage, identity(1), start=Position(0, 0), inherited=JournalView())
        self.ended = threading.Event()
        self.steps = 0
        self.error: Exception | None = None

    def step(self) -> None:
        step = self.steps
        self.journal.append(Position(0, step), 0, {"a": np.full(9, step)})
        self.steps = step = step + 1
        self.journal.checkpoint_begun()
        state = {
            "policy_model": {"w": np.full(4096, step, np.float32)},
            "optimizer": {"m": np.full(4096, step, np.float32)},
            "ref": {"w": np.ones(64, np.float32)},
        }
        self.store.save(
            Position(0, step),
            state,
            global_step=step,
            run_id="r",
            incarnation=1,
            state={},
            attachments={"config.json": str(step).encode()},
        )
        self.journal.prune(Position(0, max(step - 1, 0)))

    def run(self) -> None:
        try:
            while not self.ended.is_set():
                self.step()
        except Exception as error:
            self.error = error


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path / "run")
    trainer.step()
    trainer.step()
    trainer.start()
    yield trainer
    trainer.ended.set()
    trainer.join()
    trainer.lock.release()
    assert trainer.error is None


def looks(trainer: Trainer) -> Iterator[int]:
    """Times to look: enough of them, and until the trainer has saved meanwhile."""
    before = trainer.steps
    for look in itertools.count():
        if look >= LOOKS and trainer.steps >= before + STEPS:
            return
        assert trainer.is_alive(), trainer.error
        yield look


@pytest.mark.parametrize(
    "verb",
    [
        ["verify"],
        ["verify", "--deep"],
        ["inspect"],
        ["inspect", "--deep"],
        ["doctor", "--actor-checkpoint-path"],
    ],
    ids=" ".join,
)
def test_no_damage_is_reported(trainer: Trainer, capsys: pytest.CaptureFixture[str], verb: list[str]) -> None:
    folder = Path(trainer.storage.root) / ("train" if verb[0] == "doctor" else "")
    for _ in looks(trainer):
        code = main([*verb, str(folder), "--json"])
        said = json.loads(capsys.readouterr().out)
        if verb[0] == "doctor":
            machine = ("disk", "timeouts", "port")
            wrong = [
                item
                for item in said["findings"]
                if item["level"] == "problem" and item["check"] not in machine
            ]
            assert wrong == []
        else:
            assert [item for item in said["checkpoints"] if not item["valid"]] == []
            assert code == 0, said


def test_two_checkpoints_are_compared(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in looks(trainer):
        assert main(["diff", trainer.storage.root, trainer.storage.root, "--json"]) in (0, 1)
        assert json.loads(capsys.readouterr().out)["tensors"] == 3


def test_a_named_checkpoint_that_goes_is_said_to_be_gone_not_damaged(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path / "run")
    trainer.step()
    old = find(trainer.storage).manifest
    for _ in range(3):
        trainer.step()
    new = find(trainer.storage).manifest
    with pytest.raises(CheckpointGone, match="0_1 was removed by the run while it was read"):
        diff(trainer.storage, old, trainer.storage, new)
    with pytest.raises(NothingToResume):
        find(LocalStorage(tmp_path))


def test_what_is_damaged_is_still_reported(trainer: Trainer) -> None:
    trainer.ended.set()
    trainer.join()
    newest = find(trainer.storage).manifest
    path = Path(trainer.storage.root) / newest.files[0].path
    path.write_bytes(path.read_bytes()[:-1])
    assert [info.valid for info in list_checkpoints(trainer.storage)] == [False, True]
