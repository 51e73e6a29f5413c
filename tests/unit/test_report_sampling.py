"""Which rollouts a page shows: the last step, the first, others spread out, within bounds."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rollforward
from rollforward.inspection.history import read_past
from rollforward.inspection.report import past, sampling
from rollforward.inspection.report.curves import read_figures
from rollforward.inspection.rollouts import read_texts
from rollforward.position import Position
from rollforward.storage import LocalStorage

GROUPS, SIZE = 6, 4


@given(st.integers(0, 500))
def test_every_step_comes_once_the_last_and_the_first_before_all_others(count: int) -> None:
    order = list(sampling.spread_out(count))
    assert sorted(order) == list(range(count))
    assert order[:2] == [count - 1, 0][:count] or count == 1


@given(st.integers(3, 500), st.integers(3, 500))
def test_however_many_are_taken_no_gap_is_much_wider_than_another(count: int, taken: int) -> None:
    order = sorted(itertools.islice(sampling.spread_out(count), taken))
    gaps = [after - before for before, after in itertools.pairwise(order)]
    assert max(gaps) <= 2 * min(gaps) + 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LocalStorage:
    """Twelve steps of six prompts with four completions of 2 kB."""
    folder = tmp_path_factory.mktemp("sampling") / "run"
    tensors = {"policy": {"w": np.zeros(2, dtype=np.float32)}}
    with rollforward.open_run(folder, log=lambda _: None) as loop:
        loop.restore(tensors)
        for step in range(12):
            loop.once(step, "rollouts", lambda step=step: made(step))
            with loop.updating(step):
                tensors["policy"]["w"] += 1
            loop.outcome(step, loss=0.0)
    return LocalStorage(folder)


def made(step: int) -> tuple[np.ndarray, dict[str, Any]]:
    count = GROUPS * SIZE
    return np.zeros(count), {
        "prompts": [f"prompt {number // SIZE}" for number in range(count)],
        "completions": [f"{step} {number} " + "x" * 2000 for number in range(count)],
        "rewards": {"right": [float((number * 7 + step) % count) for number in range(count)]},
        "advantages": [0.5] * count,
    }


def sampled(storage: LocalStorage, **options: Any) -> dict[str, Any]:
    found, figures = read_past(storage), read_figures(storage)
    return sampling.as_json(storage, found, past.numbering(found, figures), **options)


def test_all_steps_of_a_short_run_are_shown_as_the_verb_shows_them(run: LocalStorage) -> None:
    found = sampled(run)
    assert [step["step"] for step in found["steps"]] == list(range(12))
    assert (found["all"], found["there"], found["first"], found["last"]) == (True, 12, "0_0", "0_11")
    shown = found["steps"][5]
    samples = read_texts(run, Position(0, 5)).samples
    assert [
        (group["prompt"], each["text"], each["reward"], each["advantage"])
        for group in shown["groups"]
        for each in group["completions"]
    ] == [(sample.prompt, sample.completion, sample.reward, sample.advantage) for sample in samples]


def test_within_few_bytes_the_last_step_comes_first(run: LocalStorage) -> None:
    found = sampled(run, most_bytes=100_000)
    assert [step["position"] for step in found["steps"]] == ["0_0", "0_11"]
    assert not found["all"]
    found = sampled(run, most_bytes=100_000, whole=[Position(0, 7)])
    assert [step["position"] for step in found["steps"]] == ["0_0", "0_7", "0_11"], (
        "what is asked for is added"
    )


def test_of_a_large_step_the_worst_and_the_best_prompts_stay(
    run: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "STEP_BYTES", 3 * SIZE * 2300)
    (step,) = sampled(run, most_bytes=1)["steps"]
    samples = read_texts(run, Position(0, 11)).samples
    rewards = [each["reward"] for group in step["groups"] for each in group["completions"]]
    assert len(step["groups"]) < step["of"] == GROUPS
    assert min(rewards) == min(sample.reward for sample in samples)
    assert max(rewards) == max(sample.reward for sample in samples)
    *_, step = sampled(run, most_bytes=1, whole=[Position(0, 11)])["steps"]
    assert len(step["groups"]) == GROUPS


def test_a_long_text_is_cut_and_the_rest_counted(run: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "TEXT_CHARACTERS", 100)
    each = sampled(run)["steps"][0]["groups"][0]["completions"][0]
    assert len(each["text"]) == 100
    assert each["more"] == len("0 0 ") + 2000 - 100
    whole = sampled(run, whole=[Position(0, 0)])["steps"][0]["groups"][0]["completions"][0]
    assert (len(whole["text"]), whole["more"]) == (2004, 0)


def test_a_step_that_the_journal_does_not_have_is_said_to_be_missing(run: LocalStorage) -> None:
    found = sampled(run, whole=[Position(3, 7)])
    assert len(found["steps"]) == 12
    assert any("has no record of step 3_7" in line for line in found["problems"])


def test_a_folder_without_a_journal_has_none(tmp_path: Path) -> None:
    assert sampled(LocalStorage(tmp_path))["steps"] == []
