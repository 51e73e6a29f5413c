"""Real processes killed with SIGKILL at random instants of a save and prune loop.

ROLLFORWARD_KILLS sets the number for a longer soak: ROLLFORWARD_KILLS=5000 pytest -m slow tests/crash
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def kill(folder: Path, kills: int, seed: int) -> dict[str, int]:
    program = Path(__file__).with_name("kill_loop.py")
    done = subprocess.run(
        [sys.executable, program, folder, str(kills), str(seed)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_killed_at_random_instants_nothing_is_lost_and_nothing_is_wrong(tmp_path):
    counts = kill(tmp_path / "run", 200, seed=1)
    assert counts["saves"] >= 8, "the first two save four times each"


@pytest.mark.slow
def test_killed_at_random_instants_many_times(tmp_path):
    kills = int(os.environ.get("ROLLFORWARD_KILLS", "1000"))
    counts = kill(tmp_path / "run", kills, seed=2)
    assert counts["kills"] == kills
    assert counts["saves"] >= 8
