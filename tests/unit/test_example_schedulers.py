"""The jobs for Slurm and Kubernetes start the program in ways that it understands, and resume."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from rollforward.cli.main import parse
from rollforward.config.keys import Config
from rollforward.config.schema import walk

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SBATCH = EXAMPLES / "slurm" / "train.sbatch"
TRY = EXAMPLES / "slurm" / "try"
JOB = EXAMPLES / "kubernetes" / "job.yaml"
PRINTS = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/}" "$@" >>"$SAID"
exit "$ENDS"
"""


def scripts() -> dict[str, str]:
    *_, job = yaml.safe_load_all(JOB.read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["bash", "-c"]
    return {"slurm": SBATCH.read_text(), "kubernetes": container["command"][2]}


def started(tmp_path: Path, script: str, run: Path, *, ends: int = 0) -> tuple[int, list[str]]:
    """Run the script with commands that only print what they are given; its exit code, and what they were."""
    for name in ("srun", "rollforward", "scontrol", "sleep"):
        (tmp_path / name).write_text(PRINTS)
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    said.unlink(missing_ok=True)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SAID": str(said), "ENDS": str(ends)}
    environment |= {"RUN": str(run), "SLURM_JOB_ID": "17"}
    arguments = [str(run), "--set", "rl_config.max_steps=3"] if "srun" in script else []
    done = subprocess.run(
        ["bash", "-c", script, "script", *arguments], env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.returncode, said.read_text().splitlines()


@pytest.mark.parametrize("scheduler", ["slurm", "kubernetes"])
def test_the_first_start_is_new_and_every_later_one_resumes(scheduler: str, tmp_path: Path) -> None:
    script, run = scripts()[scheduler], tmp_path / "run"
    _, first = started(tmp_path, script, run)
    (run / "commits").mkdir(parents=True)
    _, nothing_yet = started(tmp_path, script, run)
    (run / "commits" / "0_5.json").touch()
    _, later = started(tmp_path, script, run)
    assert first == nothing_yet
    for words, resumes in ((first, False), (later, True)):
        options, unknown = parse(words[words.index("rollforward") + 1 :])
        assert not unknown
        assert (options.verb, options.resume_training) == ("train", resumes)
        assert vars(options)["actor_config.save"] == str(run)
        assert bool(options.actor_checkpoint_path) != resumes
        assert (EXAMPLES.parent / options.config).exists()


@pytest.mark.parametrize(("ends", "queued"), [(0, False), (1, False), (2, False), (137, False), (143, True)])
def test_a_job_is_queued_again_when_its_trainer_was_stopped_and_at_no_other_time(
    ends: int, queued: bool, tmp_path: Path
) -> None:
    code, words = started(tmp_path, scripts()["slurm"], tmp_path / "run", ends=ends)
    assert code == ends
    assert ("scontrol" in words) == queued
    if queued:
        assert words[words.index("scontrol") + 1 :][:2] == ["requeue", "17"]


def test_the_job_is_queued_again_by_slurm_too_and_warned_before_its_time_limit() -> None:
    asked = re.findall(r"^#SBATCH (--[^ \n]+)", SBATCH.read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=TERM@60"} <= set(asked)


def test_the_pod_is_given_the_time_that_a_trainer_needs_and_no_second_trainer() -> None:
    volume, job = yaml.safe_load_all(JOB.read_text())
    pod = job["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 5
    assert pod["restartPolicy"] == "Never"
    assert job["spec"]["parallelism"] == 1
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
    assert "exec rollforward train" in scripts()["kubernetes"]


def test_what_the_trial_under_slurm_runs_is_understood() -> None:
    text = TRY.read_text().replace("\\\n", " ")
    keys = {path for path, _declared, _kind in walk(Config)}
    given = re.findall(r"--set (\S+)=", text)
    assert len(given) == 2
    assert set(given) <= keys
    for command in re.findall(r"^rollforward (.+?)(?: \|.*)?$", text, re.MULTILINE):
        assert not parse(shlex.split(command))[1]
    assert subprocess.run(["bash", "-n", str(TRY)], check=False).returncode == 0
