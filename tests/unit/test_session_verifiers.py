"""A verifier that would end the process ends the run with an error, from which it can be resumed."""

import os
from pathlib import Path

import pytest
from toy_session import Place, shortness

from rollforward.errors import VerifierError

CALLS: list[str] = []
"""How often one of the verifiers was called; each leaves at its sixth chunk."""


def exits(completions: list[str]) -> list[float]:
    """Runs what a model wrote, which ends with `exit()` once."""
    return _leaving(completions, "exit()")


def ends(completions: list[str]) -> list[float]:
    """The same by `os._exit`."""
    return _leaving(completions, "import os; os._exit(0)")


def _leaving(completions: list[str], program: str) -> list[float]:
    CALLS.append(program)
    if len(CALLS) == 6:
        exec(program, {})
    return shortness(completions)


@pytest.mark.parametrize(
    ("name", "said"),
    [("exits", "raised SystemExit"), ("ends", "called os._exit(0), which would have ended the process")],
)
def test_a_verifier_that_exits_is_named_with_its_step_and_leaves_a_run_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    verifier = {"reward_config__verifier_function": [f"test_session_verifiers:{name}"]}
    CALLS[:] = [""] * 100
    place.train("whole", **verifier)
    CALLS.clear()
    leave = os._exit
    with pytest.raises(VerifierError) as caught:
        place.train("run", **verifier)
    assert str(caught.value).startswith(f"step 0_2, chunk 1: verifier test_session_verifiers:{name} {said}\n")
    assert caught.value.exit_code == 1
    assert os._exit is leave
    place.train("run", resume=True, **verifier)
    assert place.digests("run") == place.digests("whole")
