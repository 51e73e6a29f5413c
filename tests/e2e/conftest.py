"""What several files compare with: runs cost seconds of compiling, so each is made once."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from command import CUT, Command


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run that was never killed, of one process. Nobody changes anything in its folder."""
    command = Command(shared(tmp_path_factory) / "whole")
    made_once(command)
    return command


@pytest.fixture(scope="session")
def whole_cut(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run whose model is cut over two workers, never killed. Nobody changes anything in its folder."""
    command = Command(shared(tmp_path_factory) / "whole_cut", workers=2, settings=CUT)
    made_once(command)
    return command


def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this pytest run share; xdist gives each a folder in it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(command: Command) -> None:
    """Run it to its end, where no other process of this pytest run has; one that is at it is waited for."""
    made = command.folder.with_suffix(".made")
    with command.folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(command.folder, ignore_errors=True)
            command.finish()
            made.touch()
