"""Train a real model with MindSpore, kill the process, resume: nothing changed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ARITHMETIC, PROGRAM, ROOT, SETTINGS, Command, torn_down

from rollforward.cli.main import main
from rollforward.engines.mindspore.package import free_port
from rollforward.inspection.doctor import rank_folders
from rollforward.processes import heartbeat
from rollforward.processes.environment import is_alive
from rollforward.store import RunLock

pytestmark = pytest.mark.engine


def test_killed_inside_generation_and_inside_an_update_it_ends_with_the_same_bits(
    whole: Command, tmp_path: Path
) -> None:
    killed = Command(tmp_path / "killed")
    killed.take_graphs(whole)
    process = killed.start()
    killed.kill_inside(process, "generate", 3)
    assert process.wait() != 0
    process = killed.start(resume=True)
    killed.kill_inside(process, "update", 4)
    process.wait()
    said = killed.finish(resume=True)

    assert "restored: policy 1.2 MB, optimizer 2.4 MB, reference 1.2 MB" in said
    assert "lock: taken over, its owner ended without releasing it: process" in said
    assert "recovery: lost: nothing" in said
    assert "recovery: over" in said
    assert killed.newest()["digests"] == whole.newest()["digests"]
    assert killed.newest()["incarnation"] == 3
    assert killed.figures() == whole.figures()
    assert [record["global_step"] for record in killed.figures()] == list(range(6))


def test_the_policy_learnt_something_and_the_reference_did_not(whole: Command) -> None:
    digests = whole.newest()["digests"]
    assert digests["policy_model"] != digests["ref"]
    assert any(record["grad_norm"] > 0 for record in whole.figures())


def test_tensor_files_open_with_other_tools(whole: Command) -> None:
    from safetensors.numpy import load_file

    (folder,) = rank_folders(whole.run / "train")
    assert folder.meta is not None
    ours = load_file(folder.path / folder.meta.file)
    base = load_file(ARITHMETIC / "model" / "model.safetensors")
    assert {name: array.shape for name, array in ours.items()} == {n: a.shape for n, a in base.items()}
    program = (
        f"import mindspore as ms; print(len(ms.load_checkpoint({str(folder.path / folder.meta.file)!r}, "
    )
    program += "format='safetensors')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(len(base))


def test_nothing_is_littered_where_it_was_started(whole: Command) -> None:
    assert {path.name for path in whole.folder.iterdir()} == {"save_ckpt", "strategy", "log", "train.txt"}
    assert [path.name for path in (whole.folder / "strategy").iterdir()] == ["strategy_0.ckpt"]
    kept = (whole.folder / "log" / "train.log").read_text()
    assert "training: starts at step 0_0" in kept


@pytest.mark.parametrize(
    ("number", "code", "phase"), [(signal.SIGTERM, 143, "generate"), (signal.SIGINT, 130, "update")]
)
def test_a_signal_ends_it_in_good_order(
    whole: Command, tmp_path: Path, number: int, code: int, phase: str
) -> None:
    command = Command(tmp_path / "run")
    command.take_graphs(whole)
    process = command.start()
    command.wait_until_inside(process, phase, 1)
    process.send_signal(number)
    said = command.ended(process, code)
    assert "resume with --resume_training" in said
    assert "Traceback" not in said
    assert RunLock.acquire(command.run).taken_over is None


def test_a_signal_while_graphs_are_compiled_is_no_error_of_the_model(tmp_path: Path) -> None:
    command = Command(tmp_path / "run")
    process = command.start()
    deadline = time.monotonic() + 120
    while not (command.run / "compile_cache").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # graphs are compiled before the first step and in it, for many seconds
    process.send_signal(signal.SIGTERM)
    said = command.ended(process, 143).splitlines()
    assert said[-1] == "stopped by SIGTERM; resume with --resume_training"
    assert {path.name for path in command.folder.iterdir()} <= {"save_ckpt", "strategy", "log", "train.txt"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--set", "rl_config.epoch=3"], "the nearest known key is 'epochs'"),
        (["train", "--config", "absent.yaml"], "absent.yaml: no such file"),
        (["train", "--resume-training", "--actor_checkpoint_path", "nowhere/train"], "no such folder"),
        (["train", "--verifier_weight", "much"], "expected numbers separated by commas"),
        (["train", "--resume_trainin"], "did you mean --resume_training?"),
        (["inspect", "nowhere"], "nowhere: no such folder"),
        (["inspekt", "nowhere"], "invalid choice"),
        (["train", "--set", "a=1", "b=2"], "unknown argument b=2; --set goes before each key"),
    ],
)
def test_input_that_cannot_be_used_ends_with_2_and_one_message(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(arguments)
    except SystemExit as exit:  # what cannot be parsed
        code = exit.code
    assert code == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Try: " in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_given_such_input_ends_with_2(tmp_path: Path) -> None:
    done = subprocess.run([*PROGRAM, "train", "--config", "absent.yaml"], capture_output=True, cwd=tmp_path)
    assert done.returncode == 2
    assert b"absent.yaml: no such file" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_weights_do_not_fit_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (ARITHMETIC / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    command = Command(tmp_path)
    arguments = [*PROGRAM, "train", *command.arguments(resume=False), "--actor_checkpoint_path", str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "model.layers.2" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def under_msrun(folder: Path) -> Command:
    """Two workers, started as the examples say."""
    msrun = [sys.executable, "-m", "mindspore.parallel.cluster.run", "--worker_num=2", "--local_worker_num=2"]
    msrun += ["--join=True", f"--master_port={free_port()}", f"--log_dir={folder}_logs"]
    return Command(folder, program=[*msrun, str(ROOT / "examples/grpo/main.py")])


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run of two workers that was never killed, under msrun and the script of the examples."""
    command = under_msrun(tmp_path_factory.mktemp("two") / "whole")
    command.finish()
    return command


def test_two_workers_killed_and_taken_over_by_a_standby_end_with_the_same_bits(
    whole_of_two: Command, tmp_path: Path
) -> None:
    """The one under msrun, the other under `--workers 2 --standby`.

    With luck the standby is ready before the kill; if not, it takes over when it is.
    """
    killed = Command(tmp_path / "killed", workers=2, max_restarts=2, standby=True)
    killed.take_graphs(whole_of_two)
    process = killed.start()
    killed.kill_inside(process, "update", 3, rank=1)
    said = killed.ended(process)
    assert said.count("standby: takes over") == 1
    assert "s after the standby was called" in said
    assert not list((killed.folder / "log").glob("standby*/worker*"))
    assert "recovery: over" in (killed.folder / "log" / "worker_0.log").read_text()
    assert re.search(
        r"restart 1 of 2, from checkpoint 0_[024] and the journal, at once, because worker", said
    )
    assert re.search(r"worker 1 \(process \d+\) was killed in phase update of step 0_[345]", said)
    assert "restart 2 of 2" not in said
    assert killed.newest()["digests"] == whole_of_two.newest()["digests"]
    assert killed.figures() == whole_of_two.figures()
    assert {path.name for path in (killed.folder / "strategy").iterdir()} == {
        "strategy_0.ckpt",
        "strategy_1.ckpt",
    }


def test_two_workers_outlive_a_full_disk_under_their_output_and_say_so(
    whole_of_two: Command, tmp_path: Path
) -> None:
    run = Command(tmp_path / "full", workers=2, settings={**SETTINGS, "rl_config.max_steps": 1})
    run.take_graphs(whole_of_two)
    code = run.start(log="/dev/full", errors="errors.txt").wait(timeout=600)
    said = (run.folder / "errors.txt").read_text()
    assert code == 0 or torn_down(said), said
    assert said.count("warning: standard output is lost (No space left on device)") == 1
    assert [line["step"] for line in run.figures()] == [0]


@pytest.mark.slow
def test_a_worker_that_stops_answering_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    """In a real collective: by our time-out under `--workers`, and by MindSpore's own under msrun."""
    stopped = Command(tmp_path / "stopped", workers=2, max_restarts=1)
    stopped.settings["rl_config.collective_timeout"] = 12
    process = stopped.start()
    pulse = stopped.wait_until_inside(process, "generate", 3, rank=1)
    os.kill(pulse.pid, signal.SIGSTOP)
    said = stopped.ended(process)
    late = rf"worker 1 \(process {pulse.pid}\) is late, in phase \w+ of step 0_[345] since .* UTC, without"
    waits = r"a sign of life for \d+ s; worker 0 waits in phase \w+ of step 0_[345]"
    assert re.search(
        rf"because CollectiveTimeout: waited 12 s for the other workers, .*: {late} {waits}", said
    )

    outer = under_msrun(tmp_path / "outer")
    outer.take_graphs(stopped)
    process = outer.start()
    pulse = outer.wait_until_inside(process, "update", 3, rank=0)
    other = heartbeat.read(outer.run, 1)
    assert other is not None
    os.kill(pulse.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 300
    while is_alive(other.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(other.pid)
    os.kill(pulse.pid, signal.SIGKILL)
    assert process.wait(timeout=600) != 0
    said = (tmp_path / "outer_logs" / "worker_1.log").read_text()
    assert re.search(rf"lost contact with a worker, .*: worker 0 \(process {pulse.pid}\) is late", said)
    outer.finish(resume=True)
    assert outer.newest()["digests"] == stopped.newest()["digests"]
