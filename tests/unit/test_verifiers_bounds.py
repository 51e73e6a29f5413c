"""Whatever a completion holds, judging it takes bounded time and memory, and is never right by accident."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rollforward.verifiers import mathematics
from rollforward.verifiers.accuracy import Comparison, is_correct
from rollforward.verifiers.exact import TooLarge, evaluate

LARGE = 100_000


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{9^9^9^9}",
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{100000000!}",
        r"\boxed{9!!!!!!!!!!!!}",
        "\\boxed{" + "9" * LARGE + "}",
        "9" * LARGE,
        "1," * LARGE,
        "1/" * LARGE,
        "1 " * LARGE,
        "-" * LARGE,
        " " * LARGE,
        "$" * LARGE,
        "½" * LARGE,
        "{" * LARGE,
        "<answer>" * LARGE,
        "<think>" * LARGE,
        "\\boxed{" * LARGE,
        "\\boxed" * LARGE,
        "\\text{" * LARGE,
        "\\frac{" * LARGE,
        "#### " * LARGE,
        "#### step\n" * LARGE,
        "18 " + "9" * LARGE,
        "Answer: " * LARGE,
        "answer " * LARGE,
        "$x$" * LARGE,
        "\\boxed{" + "(" * 1900 + "}",
        "\\boxed{" + "1" * 1990 + "}",
        "\\boxed{" + "1 " * 990 + "}",
        "\\boxed{" + "5" + " word" * 390 + "}",
        "\\boxed{" + "= " * 990 + "}",
        "\\boxed{" + "-" * 1900 + "1}",
    ],
    ids=lambda text: text[:12],
)
def test_a_hostile_completion_is_wrong_at_once(completion: str) -> None:
    started = time.process_time()
    assert not is_correct(completion, "18")
    assert not is_correct(completion, r"\{1, 2\}")
    assert time.process_time() - started < 30


@pytest.mark.parametrize("expression", ["9^9^9", "2^{100000}", "(" * 2000 + "1" + ")" * 2000, "9999!"])
def test_arithmetic_that_no_answer_needs_is_given_up(expression: str) -> None:
    with pytest.raises(TooLarge):
        evaluate(expression)


def runs(pid: int) -> bool:
    """Whether the process is there, and not only waiting to be collected."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_sympy_is_ended_when_it_cannot_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power that CPython computes in one go, deaf to every handler of a signal."""
    judge = mathematics._Judge()
    monkeypatch.setattr(mathematics, "SECONDS", 1.0)
    try:
        assert judge.ask("$x^{9^{9^{9}}}$", "$x+1$") is None  # which it computes for ever
        assert judge.ask("$x+x$", "$2x$") is True  # and the next question is answered
    finally:
        judge.close()


def test_the_judge_works_on_any_thread() -> None:
    verdicts: list[bool] = []
    thread = threading.Thread(target=lambda: verdicts.append(mathematics.equal("$y+y$", "$2y$")))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_a_judge_that_is_killed_from_outside_has_said_nothing() -> None:
    """It is asked again; a reward is never 0 because the kernel, or a person, ended a process."""
    judge = mathematics._Judge()
    try:
        assert judge.ask("$x+x$", "$2x$") is True
        assert judge._child is not None
        os.kill(judge._child.pid, signal.SIGKILL)
        assert judge.ask("$z+z$", "$2z$") is True
    finally:
        judge.close()


def test_a_judge_that_is_killed_each_time_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = mathematics._Judge()
    exchange = mathematics._exchange

    def killed_at_once(child: Any, line: str | None) -> str:
        if line is not None:
            child.kill()
            child.wait()
        return exchange(child, line)

    monkeypatch.setattr(mathematics, "_exchange", killed_at_once)
    with pytest.raises(mathematics.JudgeError, match="ended twice"):
        judge.ask("$x+x$", "$2x$")


def test_the_judge_ends_with_its_trainer() -> None:
    """Also when the trainer ends by `os._exit`, as trainers do: its input ends."""
    program = (
        "import os\n"
        "from rollforward.verifiers import mathematics\n"
        "assert mathematics.equal('$x+x$', '$2x$')\n"
        "print(mathematics._judge._child.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    pid, deadline = int(done.stdout), time.monotonic() + 300
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(pid)


def test_a_list_asks_math_verify_so_often_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def equal(given: str, expected: str) -> bool:
        asked.append(given + expected)
        return False

    monkeypatch.setattr(mathematics, "equal", equal)
    given = ", ".join(f"x+{index}" for index in range(100))
    expected = ", ".join(f"y+{index}" for index in range(100))
    assert not is_correct(f"\\boxed{{{given}}}", expected)
    assert len(asked) == 20
    comparison = Comparison()
    with pytest.raises(mathematics.GaveUp):
        any(comparison.same(f"x+{index}", f"y+{index}") for index in range(100))
    assert len(asked) == 40
