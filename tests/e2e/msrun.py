"""Starts a script once for each of several workers, as `msrun` does, with the Python of these tests."""

import os
import subprocess
import sys
from pathlib import Path

from command import ROOT, torn_down

from rollforward.engines.mindspore.package import free_port


def msrun(workers: int, logs: Path) -> list[str]:
    """What comes before the script."""
    command = [sys.executable, "-m", "mindspore.parallel.cluster.run", f"--worker_num={workers}"]
    command += [f"--local_worker_num={workers}", "--join=True", f"--master_port={free_port()}"]
    return [*command, f"--log_dir={logs}"]


def run_script(script: Path, *arguments: object, workers: int, folder: Path, logs: Path) -> None:
    """Run it to its end in a folder; what the workers said is in `logs`. One runs without msrun."""
    # msrun starts whatever `python` is on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*(msrun(workers, logs) if workers > 1 else [sys.executable]), str(script), *map(str, arguments)],
        env={**os.environ, "GLOG_v": "3", "PYTHONPATH": str(ROOT / "src"), "PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    said = "\n".join(path.read_text()[-3000:] for path in logs.glob("worker_*.log"))
    assert done.returncode == 0 or torn_down(done.stdout + done.stderr), done.stderr[-4000:] + said
