"""What several files compare with: runs cost seconds of compiling, so each is made once."""

import pytest
from command import Command


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run that was never killed, of one process. Nobody changes anything in its folder."""
    command = Command(tmp_path_factory.mktemp("whole") / "run")
    command.finish()
    return command
