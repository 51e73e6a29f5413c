"""A run's folder carries its configuration: a resume and a rebuild need no `--config`."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward.cli.main import main
from rollforward.config.keys import Config
from rollforward.config.loading import load
from rollforward.config.schema import meaning_of, walk
from rollforward.errors import StorageError
from rollforward.run import configuration
from rollforward.run.configuration import FILE, tree_of
from rollforward.storage import LocalStorage, ReadHandle
from rollforward.storage.failures import storage_error

BUILT_IN: dict[str, Any] = {
    "reward_config__verifier_function": ["accuracy_reward"],
    "reward_config__verifier_weight": [0.5],
    "context__engine": "toy",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    commit_at_once(monkeypatch)
    return Place(tmp_path)


def killed(place: Place, **changes: Any) -> None:
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=5), **{**BUILT_IN, **changes})


def test_a_killed_run_is_resumed_by_its_folder_alone(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train("whole", **BUILT_IN)
    killed(place)
    shutil.rmtree(place.model)
    capsys.readouterr()
    assert main(["train", "--resume_training", "--save_checkpoint_dir", "run"]) == 0
    said = capsys.readouterr().out
    assert f"configuration: from {place.root / 'run' / FILE}" in said
    assert "lost: nothing" in said
    assert "warning" not in said
    assert place.digests("run") == place.digests("whole")


def test_into_a_new_folder_which_carries_it_then(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.train("whole", **BUILT_IN, actor_config__lr_schedule__decay_steps=10)
    killed(place, actor_config__lr_schedule__decay_steps=10)
    named = ["--actor_checkpoint_path", "run/train", "--ref_checkpoint_path", "run/ref"]
    more = ["--set", "rl_config.max_steps=7"]
    assert main(["train", "--resume_training", *named, "--save_checkpoint_dir", "new", *more]) == 0
    said = capsys.readouterr().out
    assert "configuration: rl_config.max_steps is 7, and was 0" in said
    more = ["--set", "rl_config.max_steps=0"]
    assert main(["train", "--resume_training", "--save_checkpoint_dir", "new", *more]) == 0
    assert place.digests("new") == place.digests("whole")


def test_any_step_is_rebuilt_by_the_folder_alone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that had two configurations, by the one of its time."""
    place.train("at_4", **BUILT_IN, rl_config__max_steps=4, actor_config__lr_schedule__decay_steps=10)
    killed(place, actor_config__lr_schedule__decay_steps=10)
    changed = {**BUILT_IN, "actor_config__lr_schedule__decay_steps": 10, "rl_config__beta": 0.5}
    place.train("run", resume=True, rl_config__save_max_ckpt_num=9, **changed)
    capsys.readouterr()
    lines = (place.root / "run" / FILE).read_text().splitlines()
    assert [json.loads(line)["config"]["rl_config"]["beta"] for line in lines] == [0.01, 0.5]
    assert main(["rebuild", "run", "--to", "1_4", "--out", "late"]) == 0
    assert (place.root / "late/commits/1_4.json").is_file()
    shutil.rmtree(place.root / "run")
    killed(place, actor_config__lr_schedule__decay_steps=10)
    assert main(["rebuild", "run", "--to", "0_4", "--out", "early"]) == 0
    assert place.digests("early")["policy_model"] == place.digests("at_4")["policy_model"]
    assert main(["train", "--resume_training", "--save_checkpoint_dir", "early"]) == 0


def test_one_that_is_given_counts_and_is_compared(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    killed(place)
    capsys.readouterr()
    place.train(
        "run", resume=True, **{**BUILT_IN, "rl_config__beta": 0.5, "rl_config__save_ckpt_interval": 2}
    )
    said = capsys.readouterr().out
    assert "configuration: rl_config.save_ckpt_interval is 2, and was 3" in said
    assert "warning: since the checkpoint was saved rl_config.beta changed from 0.01 to 0.5" in said
    assert said.count("rl_config.beta") == 1


def test_code_that_only_the_folder_names_is_not_run(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder from somebody else must not choose a function of this machine and its arguments."""
    (place.root / "mine.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\n"
        "def reward(completions):\n    return [1.0] * len(completions)\n"
    )
    place.train("whole", context__engine="toy")
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=5), context__engine="toy")
    path = place.root / "run" / FILE
    good = path.read_text()
    path.write_text(good.replace("toy_session:shortness", "mine:reward"))
    capsys.readouterr()
    resume = ["train", "--resume_training", "--save_checkpoint_dir", "run"]
    assert main(resume) == 2
    told = capsys.readouterr().err
    assert "the run was trained with mine:reward, which is your own code" in told
    assert "--verifier_function mine:reward" in told
    assert not (place.root / "ran").exists()
    path.write_text(good)
    assert main([*resume, "--verifier_function", "toy_session:shortness"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert place.digests("run") == place.digests("whole")


def test_a_folder_that_carries_none_says_so(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    killed(place)
    for content in (None, b"[", b"{}\n[1]\n", b'{"incarnation": 1, "config": []}\n', b"[" * 100_000):
        (place.root / "run" / FILE).unlink(missing_ok=True)
        if content is not None:
            (place.root / "run" / FILE).write_bytes(content)
        capsys.readouterr()
        resume = ["train", "--resume_training", "--save_checkpoint_dir", "run"]
        assert main([*resume, "--set", "context.engine=toy"]) == 2
        assert (
            "give the run's configuration with --config: its folder carries none" in capsys.readouterr().err
        )


def test_a_carried_value_that_cannot_be_is_told_with_its_file(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    killed(place)
    path = place.root / "run" / FILE
    path.write_text(path.read_text().replace('"seed": 0', '"seed": "x"'))
    assert main(["train", "--resume_training", "--save_checkpoint_dir", "run"]) == 2
    assert f"run/{FILE}: rl_config.seed: expected a whole number" in capsys.readouterr().err


def test_everything_but_folders_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [(path, "there") for path, declared, _ in walk(Config) if meaning_of(declared).is_path]
    given += [("rl_config.seed", 9), ("generate_config.sampling_config.eos_token_id", [1, 2])]
    config = load(None, given).config
    tree = json.loads(json.dumps(tree_of(config)))
    assert "there" not in json.dumps(tree).replace(str(tmp_path / "there"), "")
    carried = configuration.Carried("f", tree)
    again = load(None, [("rl_config.dataset_file", "there")], carried=carried).config
    folders = [(path, value) for path, value in given if value == "there"]
    assert load(None, folders, carried=carried).config == config
    assert again.rl_config.seed == 9
    gym = load(None, [("rl_config.dataset_file", "reasoning_gym:chain_sum")]).config
    assert tree_of(gym)["rl_config"]["dataset_file"] == "reasoning_gym:chain_sum"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_read_error_does_not_cost_the_configurations_of_earlier_starts(place: Place, number: int) -> None:
    class Failing(LocalStorage):
        def open(self, path: str) -> ReadHandle:
            raise storage_error("opening", path, OSError(number, "injected"))

    killed(place)
    before = (place.root / "run" / FILE).read_bytes()
    with pytest.raises(StorageError, match="injected"):
        configuration.keep(Failing(place.root / "run"), 2, load(None, []).config)
    assert (place.root / "run" / FILE).read_bytes() == before


def test_with_beta_zero_a_killed_run_ends_with_the_same_bytes_and_its_reference_stays(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {
        "rl_config__beta": 0.0,
        "ref_config__sync_ref_model": True,
        "ref_config__ref_model_sync_steps": 2,
    }
    place.train("whole", **without)
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=5), **without)
    capsys.readouterr()
    place.train("run", resume=True, **without)
    said = capsys.readouterr().out
    assert "  loss " in said
    assert "  kl " not in said
    assert place.digests("run") == place.digests("whole")
    place.train("short", **without, rl_config__max_steps=1)
    assert place.digests("short")["ref"] == place.digests("whole")["ref"]
    assert place.digests("short")["policy_model"] != place.digests("whole")["policy_model"]
