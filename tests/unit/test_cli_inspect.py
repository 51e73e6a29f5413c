"""`rollforward inspect` lists the checkpoints of a run, and says how far back its journal reaches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from held import Holding, spread
from lockstep import LockStep
from toy_session import Place

from rollforward.cli.main import main
from rollforward.position import Position
from rollforward.replay.metrics import FILE, read
from rollforward.store import CheckpointStore


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("inspect"))
        patch.chdir(place.root)
        place.train("run", rl_config__save_max_ckpt_num=2)
    return place


def test_each_checkpoint_is_a_line(trained: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(trained.root / "run")]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[3]) for line in lines] == [("1_4", "valid"), ("2_0", "valid")]
    rewards = [record["reward"] for record in read(trained.root / "run" / FILE)]
    assert [line[4] for line in lines] == [f"{sum(rewards[6:9]) / 3:.4f}", f"{rewards[9]:.4f}"]


def test_the_journal_is_as_long_as_its_files_and_reaches_the_oldest_checkpoint(
    trained: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(trained.root / "run"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    segments = list((trained.root / "run/journal/rank_0").glob("*.journal"))
    assert said["journal"] == {
        "segments": len(segments),
        "size": sum(path.stat().st_size for path in segments),
        "reaches_back_to": "1_4",
    }
    assert said["checkpoints"][0]["position"] == "1_4"


def test_digests_are_of_the_content_and_null_where_that_would_take_reading_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The optimizer is cut into pieces; one rank that holds all of it has the same digest."""
    state = {"policy_model": {"w": np.ones((6, 2))}, "optimizer": {"m": np.arange(12.0).reshape(6, 2)}}

    def save(folder: Path, ranks: int) -> list[dict[str, str | None]]:
        def work(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
            live = Holding(state, rank, spread(state, rank, ranks, ["optimizer"] if ranks > 1 else []))
            store = CheckpointStore(folder, rank=rank, world_size=ranks, exchange=exchange)
            store.save(Position(0, 1), live, global_step=1, run_id="r", incarnation=1, state={})

        assert LockStep(ranks).run(work) == [None] * ranks
        found = []
        for deep in ([], ["--deep"]):
            assert main(["inspect", str(folder), "--json", *deep]) == 0
            found.append(json.loads(capsys.readouterr().out)["checkpoints"][0]["digests"])
        return found

    shallow, deep = save(tmp_path / "two", 2)
    whole, again = save(tmp_path / "one", 1)
    assert whole == again == deep
    assert shallow == whole | {"optimizer": None}
