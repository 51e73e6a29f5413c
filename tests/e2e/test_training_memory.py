"""An update of 16 x 96 tokens with SmolLM2-135M's shape stays under 8 GB."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_step_of_a_135m_model_stays_under_8_gb() -> None:
    script = ROOT / "benchmarks" / "training.py"
    command = [sys.executable, str(script), "--repeats=1", "--measure", "smollm2-135m", "", repr(time.time())]
    environment = {**os.environ, "GLOG_v": "3", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["peak_memory_gb"] < 8
