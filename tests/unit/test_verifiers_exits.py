"""A verifier that ends the process, or tries to, is an error that names it; never the end of the run."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rollforward.errors import ConfigError, VerifierError
from rollforward.grpo.types import Prompt
from rollforward.verifiers import resolve, score
from rollforward.verifiers.registry import NamedFunction

PROMPTS = [Prompt(index=40 + row, text=f"{row}+1=", token_ids=(1,), answer="2") for row in range(2)]


def verifier(function: Callable[..., Any]) -> NamedFunction:
    return NamedFunction("coderun:runs", function)


def raises(error: BaseException) -> Callable[..., list[float]]:
    def function(completions: Sequence[str], **_: Any) -> list[float]:
        if "b" in completions:
            raise error
        return [0.0] * len(completions)

    return function


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(), "raised SystemExit\n"),
        (SystemExit(None), "raised SystemExit\n"),
        (SystemExit(0), "raised SystemExit: 0\n"),
        (KeyboardInterrupt(), "raised KeyboardInterrupt\n"),
        (GeneratorExit(), "raised GeneratorExit\n"),
        (asyncio.CancelledError(), "raised CancelledError\n"),
        (BaseException("odd"), "raised BaseException: odd\n"),
    ],
)
def test_what_would_end_the_process_is_an_error_of_the_verifier(error: BaseException, said: str) -> None:
    with pytest.raises(VerifierError) as caught:
        score([verifier(raises(error))], PROMPTS, ["a", "b"])
    assert f"verifier coderun:runs {said}" in caught.value.message
    assert "on sample 1 (prompt 41: '1+1=' -> 'b')" in caught.value.message


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("exit()", "raised SystemExit"),
        ("quit(0)", "raised SystemExit: 0"),
        ("import sys; sys.exit('bye')", "raised SystemExit: bye"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("import os; os._exit(0)", "called os._exit(0), which would have ended the process"),
        ("import os; os.execvp('true', ['true'])", "called os.exec"),
        ("import os; os.execl('/bin/true', 'true')", "called os.execv('/bin/true')"),
    ],
)
def test_a_completion_that_is_run_cannot_end_the_run(program: str, said: str) -> None:
    def runs(completions: Sequence[str], **_: Any) -> list[float]:
        for text in completions:
            try:
                exec(text, {})
            except Exception:
                continue
        return [1.0] * len(completions)

    with pytest.raises(VerifierError) as caught:
        score([verifier(runs)], PROMPTS, ["x = 1", program])
    assert said in caught.value.message
    assert "sample 1 (prompt 41" in caught.value.message


def test_a_generator_that_exits_while_it_is_read_is_caught_too() -> None:
    def lazy(completions: Sequence[str], **_: Any) -> Any:
        for text in completions:
            if text == "b":
                sys.exit(0)
            yield 1.0

    with pytest.raises(VerifierError, match=r"(?s)raised SystemExit: 0.*sample 1 "):
        score([verifier(lazy)], PROMPTS, ["a", "b"])


def test_a_verifier_that_never_stops_returning_is_refused() -> None:
    def endless(**_: Any) -> Any:
        while True:
            yield 1.0

    with pytest.raises(VerifierError, match="at least 3 rewards for 2 completions"):
        score([verifier(endless)], PROMPTS, ["a", "b"])


def test_after_scoring_the_process_can_end_again() -> None:
    before = os._exit, os.execv, os.execve, signal.getsignal(signal.SIGINT)
    with pytest.raises(VerifierError):
        score([verifier(raises(SystemExit(0)))], PROMPTS, ["a", "b"])
    assert (os._exit, os.execv, os.execve, signal.getsignal(signal.SIGINT)) == before


def test_a_child_that_a_verifier_forks_ends_as_it_wants() -> None:
    def sandboxed(completions: Sequence[str], **_: Any) -> list[float]:
        codes = []
        for _text in completions:
            child = os.fork()
            if not child:
                os._exit(7)
            codes.append(float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
        return codes

    assert score([verifier(sandboxed)], PROMPTS, ["a", "b"]).tolist() == [[7.0], [7.0]]


def test_the_users_interrupt_is_not_taken_for_the_verifiers() -> None:
    def waits(completions: Sequence[str], **_: Any) -> list[float]:
        signal.raise_signal(signal.SIGINT)
        return [0.0] * len(completions)

    with pytest.raises(KeyboardInterrupt):
        score([verifier(waits)], PROMPTS, ["a", "b"])


def test_a_stop_of_the_run_is_not_taken_for_the_verifiers() -> None:
    """SIGTERM within a verifier: `Stopped` passes through, whatever the verifier was doing."""
    program = (
        "import os, signal\n"
        "from rollforward.processes import stopping\n"
        "stopping.take_signals()\n"
        "from rollforward.grpo.types import Prompt\n"
        "from rollforward.verifiers import score\n"
        "from rollforward.verifiers.registry import NamedFunction\n"
        "def waits(completions):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [0.0]\n"
        "prompt = Prompt(index=0, text='', token_ids=(1,), answer='')\n"
        "with stopping.ending(lambda: None) if {} else __import__('contextlib').nullcontext():\n"
        "    try:\n"
        "        score([NamedFunction('mine', waits)], [prompt], ['a'])\n"
        "    except stopping.Stopped as stopped:\n"
        "        raise SystemExit(stopped.exit_code)\n"
    )
    for trainer in (True, False):
        done = subprocess.run(
            [sys.executable, "-c", program.format(trainer)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 143, done.stderr


@pytest.mark.parametrize("line", ["exit()", "import os; os._exit(0)", "raise KeyboardInterrupt"])
def test_a_module_that_exits_when_it_is_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    name = f"leaves_{abs(hash(line))}"
    (tmp_path / f"{name}.py").write_text(line + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=f"importing {name} failed"):
        resolve([f"{name}:f"])


def test_an_exit_that_was_imported_by_name_is_held_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaves_by_name.py").write_text(
        "from os import _exit\n\ndef f(completions, **_):\n    _exit(0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(VerifierError, match=r"leaves_by_name:f called os\._exit\(0\)"):
        score(resolve(["leaves_by_name:f"]), PROMPTS, ["a", "b"])


def test_an_error_that_cannot_be_shown_is_still_named() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    with pytest.raises(VerifierError, match=r"raised Mute: .its message cannot be shown."):
        score([verifier(raises(Mute("x")))], PROMPTS, ["a", "b"])


def test_a_reward_larger_than_any_float_is_not_finite() -> None:
    from rollforward.errors import NonFinite

    with pytest.raises(NonFinite, match="sample 1 "):
        score([verifier(lambda **_: [0.0, 10**400])], PROMPTS, ["a", "b"])
