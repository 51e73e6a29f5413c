"""The core is enough to look at runs: nothing that only trains is needed, or loaded."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from toy_session import Place

from rollforward.engines.mindspore.package import free_port

CORE = {"numpy", "ml_dtypes", "xxhash", "rich"}
ONLY_FOR_TRAINING = ("mindspore", "tokenizers", "jinja2", "yaml", "math_verify", "tensorboardX", "torch")
PROGRAM = f"""\
import sys
for name in {ONLY_FOR_TRAINING!r}:
    sys.modules[name] = None
from rollforward.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""An interpreter in which none of these can be imported."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Place(tmp_path_factory.mktemp("core"))
    place.train("run")
    return place.root / "run"


def alone(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", PROGRAM, *arguments]
    # A framework that another test has loaded leaves variables of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HCCL_", "MS_"))}
    # Another run on this machine may have the usual one.
    environment["MS_SCHED_PORT"] = str(free_port())
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_core_asks_for_nothing_else() -> None:
    named = [text for text in requires("rollforward") or [] if "extra ==" not in text]
    assert {re.split(r"[<>=;\s]", text)[0].replace("-", "_") for text in named} == CORE


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "run", "--deep"),
        ("verify", "--deep", "run"),
        ("diff", "run:1_1", "run:1_1"),
        ("history", "run"),
        ("prune", "--dry_run", "run"),
        ("doctor", "--actor_checkpoint_path", "run/train"),
        ("export", "run", "--to", "exported"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_verb_that_looks_at_runs_works(run: Path, arguments: tuple[str, ...]) -> None:
    done = alone(run.parent, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_what_a_report_shows_is_gathered_too(run: Path) -> None:
    gathering = "from rollforward.inspection.report.gathering import gather, readers_of"
    program = (
        PROGRAM.partition("from rollforward")[0]
        + f"""
{gathering}
from pathlib import Path
parts = gather(readers_of([Path("run")]))
print([name for name, value in parts.items() if "error" in value], len(parts["0/rollouts/1_4"]["groups"]))
"""
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=run.parent, capture_output=True, text=True, timeout=600, check=False)
    assert (done.stdout, done.stderr) == ("[] 4\n", "")


def test_rollouts_shows_token_ids_and_says_why(run: Path) -> None:
    done = alone(run.parent, "rollouts", "run", "--step", "1_4", "--json")
    assert done.returncode == 0, done.stderr
    step = json.loads(done.stdout)
    assert all(part.isdigit() for sample in step["samples"] for part in sample["prompt"].split())
    assert "token ids are shown, not text: " in done.stderr


TRAIN = ("train", "--config", "x.yaml")
REBUILD = ("rebuild", "run", "--to", "1_1", "--out", "new")


@pytest.mark.parametrize("arguments", [TRAIN, REBUILD], ids=["train", "rebuild"])
def test_a_verb_that_trains_says_in_one_line_what_to_install(run: Path, arguments: tuple[str, ...]) -> None:
    done = alone(run.parent, *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "training needs more than the core: pip install 'rollforward[mindspore]' (yaml is missing)"
    ]
