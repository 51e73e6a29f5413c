"""`rollforward inspect` lists the checkpoints of a run, and says how far back its journal reaches."""

import json

import pytest
from toy_session import Place

from rollforward.cli.main import main
from rollforward.run.metrics import FILE, read


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
