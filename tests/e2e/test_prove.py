"""`rollforward prove` finds and names the classic mistakes of resuming, and passes what makes none."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mistaken_trainer
import pytest
from mistaken_trainer import WAITING

from rollforward.cli.main import main
from rollforward.errors import ConfigError
from rollforward.processes.environment import is_alive
from rollforward.processes.streams import Forgiving
from rollforward.proving.proof import Plan, Proof, Verdict
from rollforward.proving.prove import prove
from rollforward.proving.trial import Command

TRAINER = str(Path(mistaken_trainer.__file__))


def proof_of(mistake: str, out: Path, *, twice: bool = False, timeout: float | None = 300) -> Proof:
    """A proof with kills after steps 7 and 10, whose starts resume from checkpoints 4 and 8."""
    words = (sys.executable, TRAINER, "{out}", "--mistake", mistake)
    return prove(
        Plan(
            command=Command(words=words, resume_args="--resume"),
            out=out,
            kill_after=tuple(map(re.compile, WAITING)),
            twice=twice,
            timeout=timeout,
        )
    )


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Proof:
    return proof_of("none", tmp_path_factory.mktemp("right") / "proof")


def test_a_trainer_that_is_right_is_equal(right: Proof) -> None:
    proof = right
    assert (proof.verdict, proof.reason, proof.causes) == (Verdict.EQUAL, "", [])
    killed = proof.trials[-1]
    assert [(kill.logged, kill.checkpoint, kill.resumes) for kill in killed.kills] == [
        ("step 7", (4,), True),
        ("step 10", (8,), True),
    ]
    assert [start.code for start in killed.starts] == [None, None, 0]
    assert proof.compared is not None
    assert len(proof.compared.tensors.names) == 4
    assert [one.steps for one in proof.compared.series] == [18]
    assert proof.notes == ["metrics.jsonl: steps 5 to 7 and 9 to 10 logged again, 5 steps"]


def test_kills_before_anything_was_saved_prove_no_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = ["--", sys.executable, TRAINER, "{out}", "--waits_at", "2"]
    options = ["--kill_after", "waiting after step 2", "--resume_args", "--resume"]
    assert main(["prove", "--out", str(tmp_path / "proof"), *options, *trainer]) == 2
    said = capsys.readouterr().out
    assert "note\tkill 1 came before anything was saved: start 2 began anew" in said
    assert "not tried: no start resumed: every kill came before anything was saved" in said


@pytest.mark.parametrize(
    ("mistake", "cause", "text"),
    [
        ("schedule_twice", "learning_rate", "lr differs first, at step 5, .* the schedule is 4 steps ahead"),
        ("schedule_restarts", "learning_rate", "the schedule starts from the beginning"),
        (
            "optimizer",
            "optimizer",
            "at step 6, the second step .* the optimizer's state is not",
        ),
        (
            "data_restarts",
            "data_order",
            "ids and loss differ first, at step 5, .* data start from the beginning",
        ),
        ("first_epochs_order", "data_order", "at step 9, .* those of 1 epoch before"),
        ("random", "random_state", "loss differs first, at step 5, the first step .* the random state"),
        ("weights", "random_state", "at step 5, the first step after a resume, .* the weights"),
        ("reference", "reference", "kl differs first, at step 9, .* the reference model is not restored"),
        ("epoch_skipped", "steps_skipped", "continued at step 7, where an epoch begins: steps 5 to 6"),
    ],
)
def test_a_mistake_is_found_and_named(tmp_path: Path, mistake: str, cause: str, text: str) -> None:
    proof = proof_of(mistake, tmp_path / "proof")
    assert proof.verdict is Verdict.DIFFERENT
    assert [found.name for found in proof.causes] == [cause]
    assert re.search(text, proof.causes[0].text), proof.causes[0].text


@pytest.mark.parametrize(
    ("oddity", "note"),
    [
        ("logged_twice", "steps 4 to 10 logged again"),
        ("not_logged", "metrics.jsonl lacks step 4: done, as the tensors prove, not logged"),
        ("begins_anew", "start 2 was to resume, and began anew"),
    ],
)
def test_what_does_not_change_the_outcome_is_equal_and_named(tmp_path: Path, oddity: str, note: str) -> None:
    proof = proof_of(oddity, tmp_path / "proof")
    assert proof.verdict is Verdict.EQUAL
    assert any(note in found for found in proof.notes), proof.notes


def test_a_trainer_that_fails_when_it_resumes_does_not_resume(tmp_path: Path) -> None:
    proof = proof_of("fails", tmp_path / "proof")
    assert proof.verdict is Verdict.DIFFERENT
    assert proof.reason.startswith("start 2 ended with exit code 1\n")
    assert "| RuntimeError: size mismatch for weights\n" in proof.reason
    assert str(tmp_path / "proof" / "killed" / "start_2.log") in proof.reason


def test_a_trainer_that_hangs_is_ended_and_named(right: Proof, tmp_path: Path) -> None:
    """What does not hang has many times as long as it takes on this machine now."""
    timeout = 10 + round(20 * max(start.seconds for trial in right.trials for start in trial.starts))
    proof = proof_of("hangs", tmp_path / "proof", timeout=timeout)
    assert proof.verdict is Verdict.DIFFERENT
    assert proof.reason.startswith(f"start 2 did not end within {timeout} s, and was ended\n")


def test_a_child_in_a_session_of_its_own_does_not_outlive_the_kill(tmp_path: Path) -> None:
    proof = proof_of("leaves_child", tmp_path / "proof")
    assert proof.verdict is Verdict.EQUAL
    children = [
        int(line)
        for run in ("undisturbed", "killed")
        for line in (tmp_path / "proof" / run / "run" / "children").read_text().split()
    ]
    assert len(children) == 4
    assert not any(map(is_alive, children))
    assert "start 3 left behind, and it was ended: process " in proof.notes[0]


def test_what_two_undisturbed_runs_differ_in_may_differ_after_a_kill(tmp_path: Path) -> None:
    proof = proof_of("drifts", tmp_path / "twice", twice=True)
    assert proof.verdict is Verdict.EQUAL
    assert "not deterministic: two undisturbed runs differ in loss (up to 0.002)" in proof.notes[0]
    # Without it, the difference is there before any resume, and this is said.
    proof = proof_of("drifts", tmp_path / "once")
    assert proof.verdict is Verdict.DIFFERENT
    assert [cause.name for cause in proof.causes] == ["not_deterministic"]


def test_a_mistake_larger_than_the_noise_is_still_found(tmp_path: Path) -> None:
    proof = proof_of("optimizer", tmp_path / "proof", twice=True)
    assert proof.verdict is Verdict.DIFFERENT
    assert "two undisturbed runs were equal" in proof.notes


# The command line


def arguments(out: Path, *options: str, mistake: str = "none") -> list[str]:
    trainer = ["--", sys.executable, TRAINER, "{out}", "--mistake", mistake]
    return ["prove", "--out", str(out), "--resume_args", "--resume", *options, *trainer]


def after_steps() -> list[str]:
    return [word for pattern in WAITING for word in ("--kill_after", pattern)]


def test_the_command_says_equal_with_code_0_and_keeps_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "proof"
    assert main(arguments(out, *after_steps())) == 0
    said = capsys.readouterr()
    assert "equal: after 2 kills the run ended as the undisturbed one did" in said.out
    assert "compared\tmetrics.jsonl\t18 steps of 5 fields\tequal\n" in said.out
    assert "compared\tcheckpoint-18/model.safetensors\t1 tensor\tequal\n" in said.out
    assert "killed, start 2: " in said.err
    kept = sorted(path.relative_to(out).as_posix() for path in out.glob("*/start_*.log"))
    assert kept == [*(f"killed/start_{number}.log" for number in (1, 2, 3)), "undisturbed/start_1.log"]
    assert "step 7: loss" in (out / "killed" / "start_1.log").read_text()
    assert json.loads((out / "proof.json").read_text())["verdict"] == "equal"


def test_the_command_says_what_differs_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "proof", *after_steps(), mistake="optimizer")) == 1
    said = capsys.readouterr().out
    assert "cause\toptimizer\tloss differs first, at step 6" in said
    assert "different: after 2 kills" in said


def test_on_a_terminal_it_is_told_in_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forgiving, "isatty", lambda _self: True)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(arguments(tmp_path / "proof", *after_steps(), mistake="reference")) == 1
    said = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out)
    assert re.search(r"│ 2 +│ .*waiting after step 10\$' │ step 10 │ 8 +│ resumed │", said), said
    assert re.search(r"│ checkpoint-18/reference.safetensors │ 1 tensor +│ 1 differs, by up to ", said), said
    assert re.search(r"│ metrics.jsonl +│ kl from step 9 +│ ", said), said
    assert "cause: kl differs first, at step 9" in said


def test_json_has_the_verdict_the_causes_and_the_first_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "proof", "--json", *after_steps(), mistake="data_restarts")) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["seed"]) == ("different", None)
    assert [cause["name"] for cause in found["causes"]] == ["data_order"]
    assert found["first_difference"] == {"series": "metrics.jsonl", "step": [5], "fields": ["ids", "loss"]}
    assert [len(run["kills"]) for run in found["runs"]] == [0, 2]
    assert found["compared"]["tensors"] == 4
    assert found == json.loads((tmp_path / "proof" / "proof.json").read_text())


COUNTS = """\
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[1])
state = out / "state.json"
step = json.loads(state.read_text()) if state.exists() else 0
waits_at = int(sys.argv[2]) if step == 0 and out.parent.name == "killed" and sys.argv[2:] else None
print("begins")
while step < 20:
    time.sleep(0.05)
    step += 1
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "loss": 1 / step}) + "\\n")
    new = out / "new"
    new.write_text(json.dumps(step))
    new.rename(state)
    print("step", step)
    if step == waits_at:
        time.sleep(600)
"""
"""A trainer without tensors: it counts, and logs what it counts; it may wait for its kill behind a step."""


def test_a_trainer_without_tensors_is_judged_by_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = ["--kill_after", "step 4$", "--", sys.executable, "-c", COUNTS, "{out}", "4"]
    assert main(["prove", "--out", str(tmp_path / "proof"), *trainer]) == 0
    assert "no tensors were compared, only what was logged" in capsys.readouterr().out


def test_random_moments_are_repeated_by_their_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As shares of the undisturbed run's time, since no two runs take exactly as long."""

    def first_moment(name: str, *options: str) -> tuple[float, int]:
        trainer = ["--json", "--kills", "2", "--begin", "begins", "--", sys.executable, "-c", COUNTS, "{out}"]
        main(["prove", "--out", str(tmp_path / name), *options, *trainer])
        said = capsys.readouterr()
        found = json.loads(said.out)
        assert f"--seed {found['seed']} repeats them" in said.err
        undisturbed, killed = (run["starts"][0] for run in found["runs"])
        moment = float(killed["place"].removesuffix(" s after it began"))
        return moment / (undisturbed["seconds"] - undisturbed["begun"]), found["seed"]

    share, seed = first_moment("a")
    again, _ = first_moment("b", "--seed", str(seed))
    # Moments are told in hundredths of a second.
    assert share == pytest.approx(again, abs=0.02)


def test_a_run_that_ends_before_any_kill_could_not_be_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = ["--", sys.executable, "-c", COUNTS, "{out}"]
    assert main(["prove", "--out", str(tmp_path / "proof"), "--kill_after", "never said", *trainer]) == 2
    said = capsys.readouterr().out
    assert "not tried: no kill took place: the run came to its end before" in said
    assert "note\t1 kill of 1 did not take place" in said


def test_a_trainer_that_fails_undisturbed_could_not_be_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = ["--", sys.executable, "-c", "raise SystemExit('no data for {out}')"]
    assert main(["prove", "--out", str(tmp_path / "proof"), *trainer]) == 2
    said = capsys.readouterr().out
    assert "not tried: the undisturbed run failed: start 1 ended with exit code 1" in said
    assert "| no data for " in said


def test_a_trainer_that_leaves_nothing_to_compare_could_not_be_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = ["--", sys.executable, "-c", "import time; print('{out}'); time.sleep(0.5)"]
    assert main(["prove", "--out", str(tmp_path / "proof"), "--kills", "1", *trainer]) == 2
    assert "not tried: there is nothing to compare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--", "python", "train.py"], "the command has no {out} in it"),
        (["--", "no-such-trainer", "{out}"], "no-such-trainer: no such command"),
        (["--kills", "2", "--kill_after", "x", "--", "python", "{out}"], "--kills and --kill_after"),
        (["--kill_after", "(", "--", "python", "{out}"], "'(' is not a regular expression"),
        (["--timeout", "-1", "--", "python", "{out}"], "expected a number of seconds"),
        ([], "there is no command to prove"),
    ],
    ids=["no out", "no command", "both kinds of kills", "no pattern", "no seconds", "nothing"],
)
def test_what_cannot_be_tried_is_said_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], error: str
) -> None:
    try:
        code: int | str | None = main(["prove", "--out", str(tmp_path / "proof"), *words])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "proof").exists()


def test_a_folder_in_use_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something is there already"):
        proof_of("none", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


WAITS = """\
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
pathlib.Path(sys.argv[1], "pids").write_text(f"{os.getpid()} {child.pid}")
print("waiting")
time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_command_leaves_no_trainer_behind(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "proof"
    command = [sys.executable, "-m", "rollforward.cli.main", "prove", "--out", str(out)]
    process = subprocess.Popen([*command, "--", sys.executable, "-c", WAITS, "{out}"], stderr=subprocess.PIPE)
    log, deadline = out / "undisturbed" / "start_1.log", time.monotonic() + 300
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(word) for word in (out / "undisturbed" / "run" / "pids").read_text().split()]
    assert all(map(is_alive, pids))
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}.get(number)
    assert name is None or said.decode().splitlines()[-1] == f"stopped by {name}"
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_alive, pids))
