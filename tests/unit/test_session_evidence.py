"""A number that is not finite stops a run, is kept in plain files, and poisons nothing."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from toy_engine import ToyEngine
from toy_session import Place, ToyPackage, shortness

from rollforward.cli.main import main
from rollforward.errors import NonFinite
from rollforward.grpo.ports import Engine, Group
from rollforward.grpo.types import EngineSettings, TrainingBatch, UpdateOutcome
from rollforward.store import RunLock

CALLS: list[int] = []
"""How often `touchy` was called; it is mended by the seventh."""


def touchy(completions: list[str]) -> list[float]:
    """`shortness`, but for one completion of the sixth chunk."""
    rewards = shortness(completions)
    CALLS.append(len(rewards))
    if len(CALLS) == 6:
        rewards[2] = float("nan")
    return rewards


@dataclass
class Poisoned(ToyPackage):
    """One sample of an update has an advantage that is no number, on the workers that it is poisoned on."""

    update: int | None = 4

    def create(self, settings: EngineSettings, group: Group) -> Engine:
        engine = super().create(settings, group)
        update = engine.update

        def poisoned(batch: TrainingBatch, learning_rate: float) -> UpdateOutcome:
            if len(self.updates) == self.update:
                batch.advantages[5] = np.nan
            return update(batch, learning_rate)

        engine.update = poisoned  # type: ignore[method-assign]
        return engine


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def test_an_update_is_kept_with_its_samples_and_the_run_goes_on_once_the_cause_is_gone(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train("whole")
    with pytest.raises(NonFinite) as caught:
        place.train("run", Poisoned())
    folder = place.root / "run" / "evidence" / "0_4-1"
    told = str(caught.value)
    assert told.startswith("step 0_4, update 0: loss nan")
    assert "  worker 0, sample 5 (sample 5 of chunk 0, prompt " in told
    assert f"evidence: {folder}" in told

    kept = json.loads((folder / "rank_0.json").read_text())
    arrays = safetensors.numpy.load_file(folder / kept["arrays"])
    assert kept["facts"]["loss"] == "nan"
    assert kept["weights_not_finite"] == {}
    assert [sample["row"] for sample in kept["samples"] if sample["at_fault"]] == [5]
    assert len(kept["samples"]) == len(arrays["completion_ids"]) == 16
    assert kept["samples"][9]["chunk"] == 1
    sample, prompts = kept["samples"][5], place.dataset.read_text().splitlines()
    assert sample["prompt"] == json.loads(prompts[sample["prompt_index"]])["prompt"]
    assert sample["rewards"] == {"toy_session:shortness": pytest.approx(shortness([sample["completion"]])[0])}
    assert np.isnan(arrays["advantages"]).tolist() == [row == 5 for row in range(16)]
    assert np.isnan(arrays["computed.loss"][5]).any()

    with RunLock.acquire(place.root / "run") as lock:
        assert lock.taken_over is None
    main(["doctor", "--save_checkpoint_dir", str(place.root / "run")])
    assert "start 1 stopped at step 0_4: a number was not finite" in capsys.readouterr().out
    place.train("run", resume=True)
    assert place.digests("run") == place.digests("whole")


def test_every_worker_keeps_its_own_and_all_tell_whose_samples_they_were(place: Place) -> None:
    errors = place.train_by_two("run", Poisoned(update=None), Poisoned(update=2))
    for error in errors:
        assert isinstance(error, NonFinite)
        assert "  worker 1, sample 5 (sample 5 of chunk 2, prompt " in str(error)
        assert "  worker 0" not in str(error)
    folder = next((place.root / "run" / "evidence").iterdir())
    assert {path.name for path in folder.iterdir()} == {
        f"rank_{rank}.{kind}" for rank in range(2) for kind in ("json", "safetensors")
    }


def test_a_reward_names_the_verifier_and_the_sample_and_is_given_anew_once_that_is_mended(
    place: Place,
) -> None:
    CALLS.clear()
    place.train("whole")
    verifier = {"reward_config__verifier_function": ["test_session_evidence:touchy"]}
    with pytest.raises(NonFinite) as caught:
        place.train("run", **verifier)
    told = str(caught.value)
    assert told.startswith(
        "step 0_2, chunk 1: verifier test_session_evidence:touchy gave a reward of nan to "
    )
    assert "sample 2 (prompt " in told
    kept = json.loads((place.root / "run/evidence/0_2-1/rank_0.json").read_text())
    assert (kept["phase"], kept["facts"]) == ("verify", {"verifier": "test_session_evidence:touchy"})
    assert [sample["row"] for sample in kept["samples"] if sample["at_fault"]] == [2]
    place.train("run", resume=True, **verifier)
    assert place.digests("run") == place.digests("whole")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_themselves_are_named(place: Place, dtype: str) -> None:
    class Broken(ToyPackage):
        def create(self, settings: EngineSettings, group: Group) -> Engine:
            engine = super().create(settings, group)
            assert isinstance(engine, ToyEngine)
            bias = engine.roles["ref"]["head.bias"]
            bias[3:5] = np.nan
            engine.roles["ref"]["head.bias"] = bias.astype(np.dtype(dtype))
            return engine

    with pytest.raises(NonFinite, match=r"step 0_0, chunk 0: reference log-probabilities of samples \["):
        place.train("run", Broken())
    kept = json.loads((place.root / "run/evidence/0_0-1/rank_0.json").read_text())
    assert kept["weights_not_finite"] == {"ref/head.bias": 2}


def test_a_disk_that_cannot_keep_it_is_told_beside_the_error(place: Place) -> None:
    (place.root / "run").mkdir()
    (place.root / "run" / "evidence").write_text("in the way")
    with pytest.raises(NonFinite, match=r"(?s)step 0_4, update 0.*the evidence could not be kept"):
        place.train("run", Poisoned())
