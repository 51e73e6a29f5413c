"""A run that a signal ends, wherever it was, has let go of its folder and goes on bit for bit."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy_session
from toy_session import Place

from rollforward.store import RunLock

PROGRAM = """
import os, sys, threading
from pathlib import Path
from rollforward.processes import stopping
stopping.take_signals()
stopping.allow(60)  # however busy the machine is
sys.path.insert(0, sys.argv[1])
from toy_session import Place
from rollforward.processes.heartbeat import Heartbeat

def phase(self, position, name):
    if (name, str(position)) == (sys.argv[3], "0_4"):
        os.kill(os.getpid(), int(sys.argv[4]))
        # Whichever thread the kernel gives it to, the handler runs here.
        while not stopping._state.came:
            threading.Event().wait(0.001)

Heartbeat.phase = phase
try:
    Place(Path(sys.argv[2])).train("run")
finally:
    print("unwound")
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("whole"))
    place.train("run")
    return place


@pytest.mark.parametrize(
    ("phase", "number", "code"),
    [("generate", signal.SIGINT, 130), ("log", signal.SIGTERM, 143), ("update", signal.SIGTERM, 143)],
)
def test_stopped_inside_a_phase(whole: Place, tmp_path: Path, phase: str, number: int, code: int) -> None:
    place = Place(tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(Path(toy_session.__file__).parent), str(tmp_path), phase]
    done = subprocess.run([*command, str(int(number))], capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr
    assert "unwound" not in done.stdout
    assert "stopped by" in done.stderr
    with RunLock.acquire(place.root / "run") as lock:
        assert lock.taken_over is None
    place.train("run", resume=True)
    assert place.digests("run") == whole.digests("run")
