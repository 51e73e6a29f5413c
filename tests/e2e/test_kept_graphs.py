"""Graphs that are taken from an earlier start compute the same bits as freshly compiled ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("engine_digest.py")
SOURCE = Path(__file__).parents[2] / "src"


def test_a_start_with_kept_graphs_computes_the_same_bits_whatever_script_it_is_started_by(
    tmp_path: Path,
) -> None:
    other = tmp_path / "other.py"
    lines = ("import sys", f"sys.path.insert(0, {str(SCRIPT.parent)!r})", "from engine_digest import main")
    other.write_text("\n".join([*lines, "main(sys.argv[1])", ""]))
    environment = {**os.environ, "GLOG_v": "3", "PYTHONPATH": str(SOURCE)}
    folder = tmp_path / "graphs"
    found, kept = [], []
    for script, arguments in ((SCRIPT, []), (SCRIPT, [str(folder)]), (other, [str(folder)])):
        command = [sys.executable, str(script), *arguments]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=240, check=True
        )
        found.append(done.stdout.splitlines()[-1])
        kept.append(sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*.mindir")))
    assert found[0] == found[1] == found[2]
    assert kept[1]
    assert kept[1] == kept[2], "the last start compiled again instead of taking what was kept"
