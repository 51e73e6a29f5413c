"""What a run says of its own checkpoints: in the log, in the metrics, and by how it ends."""

from pathlib import Path

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.run.metrics import FILE, read


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def told_in_metrics(run: Path, name: str) -> int:
    return sum(record[name] for record in read(run / FILE))


class TestNothingLearnt:
    """Steps were taken, and the policy has the bytes that it had."""

    def test_a_learning_rate_of_zero_is_told_and_stops_nothing(
        self, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        place.train("run", actor_config__lr_schedule__lr=0)
        warnings = [line for line in capsys.readouterr().out.splitlines() if "suspicious" in line]
        assert [line.partition(", ")[0] for line in warnings] == [
            f"warning: suspicious: the policy of checkpoint {now} is byte for byte that of {before}"
            for before, now in [("0_0", "0_3"), ("0_3", "1_1"), ("1_1", "1_4"), ("1_4", "2_0")]
        ]
        assert "only with a learning rate of 0" in warnings[0]
        assert told_in_metrics(place.root / "run", "saves_suspicious") == 4
        assert len(read(place.root / "run" / FILE)) == 10

    def test_the_checkpoint_that_was_resumed_from_is_compared_with_too(
        self, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        commit_at_once(monkeypatch)
        with pytest.raises(Killed):
            place.train("run", ToyPackage(dies_at_update=4))
        assert "suspicious" not in capsys.readouterr().out
        place.train("run", resume=True, rl_config__max_steps=6, actor_config__lr_schedule__lr=0)
        assert "checkpoint 1_1 is byte for byte that of 0_3, 3 steps earlier" in capsys.readouterr().out

    def test_learning_is_not_suspicious(self, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
        place.train("run")
        assert "suspicious" not in capsys.readouterr().out
        assert told_in_metrics(place.root / "run", "saves_suspicious") == 0
