"""Train a real model with MindSpore, kill the process, resume: nothing changed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import ARITHMETIC, PROGRAM, Command

from rollforward.cli.main import main
from rollforward.inspection.doctor import rank_folders
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
    # The folder is there while MindSpore compiles a graph.
    deadline = time.monotonic() + 600
    while not any((command.run / "compile_cache").glob("*/compiling")) and time.monotonic() < deadline:
        assert process.poll() is None, (command.folder / "train.txt").read_text()
        time.sleep(0.005)
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
