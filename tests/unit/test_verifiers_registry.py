"""How verifiers are named, what they are handed, and what becomes of those that misbehave."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollforward.errors import ConfigError, NonFinite, VerifierError
from rollforward.grpo.types import Prompt
from rollforward.verifiers import resolve, score
from rollforward.verifiers.registry import NamedFunction

PROMPTS = [
    Prompt(index=40, text="1+1=", token_ids=(1,), answer="2", columns={"level": 1}),
    Prompt(index=41, text="2+2=", token_ids=(1,), answer="4", columns={"level": 2, "kind": "sum"}),
]


def verifier(function: Callable[..., Any]) -> NamedFunction:
    return NamedFunction("mine", function)


def test_each_verifier_fills_its_column() -> None:
    completions = ["2", "<think>easy</think><answer>4</answer>"]
    rewards = score(resolve(["accuracy_reward", "format_reward"]), PROMPTS, completions)
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_the_columns_of_the_dataset_arrive_as_lists() -> None:
    seen: dict[str, Any] = {}

    def reward(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0, 1.0]

    score([verifier(reward)], PROMPTS, ["a", "b"])
    assert seen == {
        "prompts": ["1+1=", "2+2="],
        "completions": ["a", "b"],
        "answer": ["2", "4"],
        "level": [1, 2],
        "kind": [None, "sum"],
    }


def test_a_function_may_take_only_what_it_needs() -> None:
    def short(completions: Sequence[str], level: Sequence[int]) -> np.ndarray:
        return np.array([len(text) == size for text, size in zip(completions, level, strict=True)])

    assert score([verifier(short)], PROMPTS, ["a", "b"]).tolist() == [[1.0], [0.0]]


def test_a_users_function_is_found_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards_a.py").write_text(
        "def half(completions, **_):\n    return [0.5] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    [found] = resolve(["my_rewards_a:half"])
    assert found.name == "my_rewards_a:half"
    assert score([found], PROMPTS, ["", ""]).tolist() == [[0.5], [0.5]]


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'acuracy_rewards'.*did you mean accuracy_reward\?"):
        resolve(["acuracy_rewards"])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "no verifier is named"),
        (["format_reward", "format_reward"], "more than once"),
        (["no_such_module_x:f"], "ModuleNotFoundError"),
        (["json:no_such_function"], "no function 'no_such_function'.*loads"),
        (["json:decoder"], "no function 'decoder'"),
    ],
)
def test_what_cannot_be_resolved_is_refused_before_training(names: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        resolve(names)


def test_a_users_module_that_raises_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards_b.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match="RuntimeError: no licence"):
        resolve(["my_rewards_b:f"])


def test_a_verifier_that_raises_is_named_with_its_sample() -> None:
    def picky(completions: Sequence[str], **_: Any) -> list[float]:
        return [float(text) for text in completions]

    with pytest.raises(VerifierError) as caught:
        score([verifier(picky)], PROMPTS, ["1", "one"])
    assert "verifier mine raised ValueError" in caught.value.message
    assert "sample 1 (prompt 41: '2+2=' -> 'one')" in caught.value.message
    assert "sample 0" not in caught.value.message


def test_a_verifier_that_raises_on_no_sample_alone_is_reported_on_all() -> None:
    def only_one(completions: Sequence[str]) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(VerifierError, match=r"(?s)too many.*no sample alone.*sample 0 .*sample 1 "):
        score([verifier(only_one)], PROMPTS, ["a", "b"])


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned None; it must return a list of 2 numbers"),
        (1.0, r"returned 1.0 \(of type float\)"),
        ([1.0], "1 rewards for 2 completions"),
        ([1.0, 2.0, 3.0], "3 rewards for 2 completions"),
        ([1.0, None], "returned None, which is not a number, for sample 1 .prompt 41"),
        (["1", 2.0], "returned '1' .of type str., which is not a number, for sample 0"),
        ([1.0, [2.0]], "which is not a number, for sample 1"),
        (np.zeros((2, 1)), "which is not a number, for sample 0"),
        ("ab", "which is not a number"),
    ],
)
def test_what_is_not_one_number_a_completion_is_refused(returned: Any, said: str) -> None:
    with pytest.raises(VerifierError, match=said):
        score([verifier(lambda **_: returned)], PROMPTS, ["a", "b"])


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e300])
def test_rewards_that_are_not_finite_name_their_samples(bad: float) -> None:
    with pytest.raises(NonFinite, match=r"verifier mine .* sample 1 \(prompt 41"):
        score([verifier(lambda **_: [0.0, bad])], PROMPTS, ["a", "b"])


@pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="the extra `gym` is not installed"
)
def test_reasoning_gym_scores_its_own_problems() -> None:
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)[0]
    columns = {"question": entry["question"], "metadata": entry["metadata"]}
    prompt = Prompt(index=0, text="?", token_ids=(1,), answer=entry["answer"], columns=columns)
    right, wrong = entry["answer"], str(int(entry["answer"]) + 1)
    rewards = score(
        resolve(["reasoning_gym_score"]), [prompt] * 3, [right, f"<answer>{right}</answer>", wrong]
    )
    assert rewards[0, 0] == rewards[1, 0] == 1.0
    assert rewards[2, 0] < 1.0


@pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is not None, reason="the extra `gym` is installed"
)
def test_without_the_extra_reasoning_gym_says_how_to_get_it() -> None:
    with pytest.raises(ConfigError, match=r"rollforward\[gym\]"):
        score(resolve(["reasoning_gym_score"]), PROMPTS, ["a", "b"])
