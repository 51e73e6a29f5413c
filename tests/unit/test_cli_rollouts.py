"""`rollforward rollouts` shows the prompts, completions and rewards that a step was trained on."""

import json

import pytest
from toy_session import Killed, Place, ToyPackage, shortness

from rollforward.cli.main import main
from rollforward.replay.metrics import FILE, read


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was killed in the update of step 0_4."""
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("rollouts"))
        patch.chdir(place.root)
        weights = {"reward_config__verifier_weight": [0.5]}
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4), **weights)
    return place


def rollouts(place: Place, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["rollouts", str(place.root / "run"), *options]) == 0
    return capsys.readouterr().out


def test_each_completion_is_shown_with_its_prompt_and_its_reward(
    run: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.loads(rollouts(run, capsys, "--step", "0_3", "--json"))
    samples = said["samples"]
    assert len(samples) == 4 * 4
    problems = [json.loads(line)["prompt"] for line in run.dataset.read_text().splitlines()]
    for sample in samples:
        assert sample["prompt"].replace(" ", "") == problems[sample["prompt_index"]]
        (reward,) = sample["rewards"].values()
        assert reward == pytest.approx(shortness([sample["completion"]])[0])
        assert sample["reward"] == pytest.approx(0.5 * reward), "weighted as configured"
    mean = sum(sample["reward"] for sample in samples) / len(samples)
    record = read(run.root / "run" / FILE)[3]
    assert mean == pytest.approx(record["reward"])
    assert [update["loss"] for update in said["updates"]] == [record["loss"]]


def test_the_worst_come_first(run: Place, capsys: pytest.CaptureFixture[str]) -> None:
    everything = json.loads(rollouts(run, capsys, "--step", "0_2", "--json"))["samples"]
    found = json.loads(rollouts(run, capsys, "--step", "0_2", "--worst", "3", "--json"))["samples"]
    assert [sample["reward"] for sample in found] == sorted(sample["reward"] for sample in everything)[:3]


def test_a_step_that_a_kill_cut_short_shows_what_was_finished(
    run: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.loads(rollouts(run, capsys, "--step", "0_4", "--json"))
    assert len(said["samples"]) == 16
    assert said["updates"] == []


def test_each_completion_is_a_line(run: Place, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split("\t") for line in rollouts(run, capsys, "--step", "0_3").splitlines()]
    assert len(lines) == 16
    assert {len(line) for line in lines} == {9}
    assert {line[6] for line in lines} <= {"stopped", "cut"}
    assert all(isinstance(json.loads(text), str) for line in lines for text in line[7:])


def test_a_step_that_is_not_there_is_refused_with_what_is(
    run: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollouts", str(run.root / "run"), "--step", "1_2"]) == 2
    assert "rank 0, start 1: steps 0_0 to 0_4" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["rollouts", str(run.root / "run"), "--step", "7"])
    assert caught.value.code == 2
    assert "is not a position" in capsys.readouterr().err
