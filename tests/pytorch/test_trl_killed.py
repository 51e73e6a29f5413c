"""Real processes, killed by SIGKILL: one, or two that train together."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("small_trl.py")


def start(out: Path, case: str, *, processes: int = 1, dies: str = "", stock: bool = False) -> str | None:
    """The bytes that all processes ended with; None when they were killed."""
    command = [
        str(PROGRAM),
        case,
        str(out),
        *(["--stock"] if stock else []),
        *(["--dies", dies] if dies else []),
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    ends = set(re.findall(r"^end (\w+)$", done.stdout, re.MULTILINE))
    assert bool(ends) == (done.returncode == 0), done.stderr[-2000:]
    assert bool(ends) != bool(dies), done.stdout[-2000:]
    assert len(ends) < 2, "all processes hold the same weights"
    return ends.pop() if ends else None


@pytest.mark.parametrize(
    ("case", "deaths"),
    [("accumulating", ["generate:4", "accumulate:9"]), ("reference follows", ["update:7"])],
)
def test_a_killed_process_resumes_to_the_same_bytes(case: str, deaths: list[str], tmp_path: Path) -> None:
    for place in deaths:
        start(tmp_path / "killed", case, dies=place)
    assert start(tmp_path / "killed", case) == start(tmp_path / "stock", case, stock=True)


def test_two_processes_of_which_one_is_killed_resume_to_the_same_bytes(tmp_path: Path) -> None:
    """Whatever one had finished and the other had not: rewards are gathered over both."""
    for place in ("generate:4", "update:7"):
        start(tmp_path / "killed", "plain", processes=2, dies=place)
    expected = start(tmp_path / "stock", "plain", processes=2, stock=True)
    assert start(tmp_path / "killed", "plain", processes=2) == expected
