"""A run of `rollforward.trl` that died ends with the bytes of one that did not, and that with TRL's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_trl import CASES, Death, Died, build, bytes_of, die, history_of

from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import find


@dataclass(frozen=True)
class End:
    """What a run ended with."""

    weights: str
    history: list[dict[str, Any]]
    digests: dict[str, str]
    """By role, of the last checkpoint, but for that with the clock's figures."""


def train(case: str, out: Path, **how: Any) -> End:
    trainer = build(CASES[case], out, **how)
    trainer.train()
    return end_of(trainer, out)


def end_of(trainer: Any, out: Path) -> End:
    digests = find(LocalStorage(out)).manifest.role_digests()
    digests.pop("clock")
    return End(bytes_of(trainer), history_of(trainer), dict(digests))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    """Case -> an undisturbed run."""
    return {case: train(case, tmp_path_factory.mktemp("whole")) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_an_undisturbed_run_has_the_bytes_of_trl_itself(
    case: str, tmp_path: Path, whole: dict[str, End]
) -> None:
    stock = build(CASES[case], tmp_path, stock=True)
    stock.train()
    assert bytes_of(stock) == whole[case].weights
    assert history_of(stock) == whole[case].history


DEATHS = [("generate", 4), ("update", 7), ("save", 9), ("updated", 10), ("generate", 12)]
"""One start after the other, each with the next one."""


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_died_again_and_again_has_the_bytes_of_one_that_did_not(
    case: str, tmp_path: Path, whole: dict[str, End]
) -> None:
    deaths = list(DEATHS)
    if case == "accumulating":
        deaths.insert(1, ("accumulate", 5))
    if case == "by epochs":
        deaths = [("generate", 4), ("update", 7), ("updated", 10), ("save", 12)]
    if CASES[case].steps > 16:
        deaths += [("update", 14), ("generate", 25)]
    for place, step in deaths:
        with pytest.raises(Died):
            train(case, tmp_path, death=Death(place, step, die))
    assert train(case, tmp_path) == whole[case]


def test_no_finished_rollout_is_rewarded_again(tmp_path: Path) -> None:
    rewarded: list[int] = []
    for place, step in DEATHS:
        with pytest.raises(Died):
            train("plain", tmp_path, death=Death(place, step, die), rewarded=rewarded)
    train("plain", tmp_path, rewarded=rewarded)
    again = {step for step in rewarded if rewarded.count(step) > 1}
    assert again == {4, 12}, "those that died within the reward function"
    assert sorted(set(rewarded)) == list(range(28))


def test_a_run_that_is_over_trains_no_further(tmp_path: Path) -> None:
    first = train("plain", tmp_path)
    rewarded: list[int] = []
    assert train("plain", tmp_path, rewarded=rewarded).weights == first.weights
    assert rewarded == []


def test_the_replay_is_compared_with_the_record(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(Died):
        train("plain", tmp_path, death=Death("update", 8, die))
    train("plain", tmp_path, said=said.append)
    over = next(line for line in said if line.startswith("recovery: over"))
    assert "2 of 2 updates equal to the last bit" in over


def test_a_damaged_checkpoint_costs_nothing(tmp_path: Path, whole: dict[str, End]) -> None:
    with pytest.raises(Died):
        train("plain", tmp_path, death=Death("update", 11, die))
    newest = find(LocalStorage(tmp_path)).manifest
    path = tmp_path / next(file.path for file in newest.files if "policy" in file.path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    said: list[str] = []
    assert train("plain", tmp_path, said=said.append) == whole["plain"]
    assert any("rejected" in line for line in said)
    assert newest.position == Position(0, 9)


def test_save_steps_may_change_between_two_starts(tmp_path: Path, whole: dict[str, End]) -> None:
    with pytest.raises(Died):
        train("plain", tmp_path, death=Death("update", 8, die))
    assert train("plain", tmp_path, save_steps=5).weights == whole["plain"].weights
    assert (tmp_path / "commits" / "0_25.json").exists()
