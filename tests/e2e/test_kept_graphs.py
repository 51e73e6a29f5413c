"""Graphs that are taken from an earlier start compute the same bits as freshly compiled ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT
from msrun import run_script

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("engine_digest.py")
GRAPHS = Path(__file__).parents[1] / "unit" / "engine" / "graphs_process.py"


def test_a_start_with_kept_graphs_computes_the_same_bits_whatever_script_it_is_started_by(
    tmp_path: Path,
) -> None:
    other = tmp_path / "other.py"
    lines = ("import sys", f"sys.path.insert(0, {str(SCRIPT.parent)!r})", "from engine_digest import main")
    other.write_text("\n".join([*lines, "main(sys.argv[1])", ""]))
    environment = {**os.environ, "GLOG_v": "3", "PYTHONPATH": str(ROOT / "src")}
    folder = tmp_path / "graphs"
    found, taken = [], []
    for script, arguments in ((SCRIPT, []), (SCRIPT, [str(folder)]), (other, [str(folder)])):
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=600, check=True
        )
        result, graphs = json.loads(done.stdout.splitlines()[-1])
        found.append(result)
        taken.append(graphs)
    assert found[0] == found[1] == found[2]
    assert {"adamw", "learn-4x10"} <= taken[1].keys()
    assert {"prefill", "decode"} <= {name.partition("-")[0] for name in taken[1]}
    assert not any(taken[1].values())
    assert taken[2] == dict.fromkeys(taken[1], True), "the last start compiled again"


def test_each_of_two_workers_keeps_its_own(tmp_path: Path) -> None:
    for taken in (False, True):
        logs = tmp_path / f"logs_{taken}"
        graphs = ("1", "times_3", "plus-4")
        run_script(GRAPHS, tmp_path / "graphs", *graphs, workers=2, folder=tmp_path, logs=logs)
        for rank in range(2):
            said = (logs / f"worker_{rank}.log").read_text()
            found = json.loads(next(line for line in said.splitlines() if line.startswith('{"times_3"')))
            assert found == {"times_3": [60.0, taken], "plus-4": [6.0, taken], "unkept": [140.0, False]}
