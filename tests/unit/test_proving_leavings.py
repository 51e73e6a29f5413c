"""What counts as newest checkpoint and as series in folders of any trainer; and the moments of kills."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollforward.proving.leavings import family_of, look_at
from rollforward.proving.moments import draw_moments


@pytest.mark.parametrize(
    ("path", "family", "numbers"),
    [
        ("checkpoint-12/optimizer.pt", "checkpoint-*/optimizer.pt", (12,)),
        ("checkpoint-12/model-00002-of-00003.safetensors", "checkpoint-*/model.safetensors", (12,)),
        ("checkpoint-12/rng_state_1.pth", "checkpoint-*/rng_state_1.pth", (12,)),
        ("global_step40/mp_rank_00_model_states.pt", "global_step*/mp_rank_00_model_states.pt", (40,)),
        ("lightning/epoch=1-step=40.ckpt", "lightning/epoch=*-step=*.ckpt", (1, 40)),
        ("iter_0000100/rank_0.pt", "iter_*/rank_0.pt", (100,)),
        ("epoch_2/step_30/weights.bin", "epoch_*/step_*/weights.bin", (2, 30)),
        ("train/rank_0/policy_model_rank_0-1_20.ckpt", "train/rank_0/policy_model_rank_0-*_*.ckpt", (1, 20)),
        ("ckpt_100.safetensors", "ckpt_*.safetensors", (100,)),
        ("model.safetensors", "model.safetensors", ()),
        ("layer_3.pt", "layer_3.pt", ()),
        ("lockstep-3/model.pt", "lockstep-3/model.pt", ()),
        ("seed_7/checkpoint_5.pt", "seed_7/checkpoint_*.pt", (5,)),
    ],
)
def test_the_numbers_of_steps_are_told_from_those_of_shards_and_ranks(
    path: str, family: str, numbers: tuple[int, ...]
) -> None:
    assert family_of(path) == (family, numbers)


def make(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")


def test_the_highest_number_is_the_newest_not_the_last_name(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-9/model.safetensors", "checkpoint-10/model.safetensors")
    make(tmp_path, "checkpoint-9/trainer_state.json", "checkpoint-10/trainer_state.json", "metrics.jsonl")
    found = look_at(tmp_path)
    assert found.tensors["checkpoint-*/model.safetensors"].files == ["checkpoint-10/model.safetensors"]
    assert found.series["checkpoint-*/trainer_state.json"].files == ["checkpoint-10/trainer_state.json"]
    assert set(found.series) == {"checkpoint-*/trainer_state.json", "metrics.jsonl"}
    assert found.newest == (10,)
    assert found.saved


def test_shards_of_the_newest_are_kept_together(tmp_path: Path) -> None:
    make(tmp_path, "checkpoint-4/model-00001-of-00001.safetensors")
    shards = [f"checkpoint-8/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    make(tmp_path, *shards)
    assert look_at(tmp_path).tensors["checkpoint-*/model.safetensors"].files == shards


def test_a_run_of_ours_is_read_by_its_manifests_not_by_its_files(tmp_path: Path) -> None:
    make(tmp_path, "run/commits/0_10.json", "run/commits/1_2.json", "run/commits/1_1.json")
    make(tmp_path, "run/train/rank_0/policy_model_rank_0-1_2.safetensors", "run/metrics.jsonl")
    found = look_at(tmp_path)
    assert list(found.runs) == ["run"]
    assert found.newest == (1, 2)
    assert not found.tensors
    assert list(found.series) == ["run/metrics.jsonl"]


def test_links_are_not_followed(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/model.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    assert not look_at(tmp_path / "run").saved


def test_files_that_the_user_names_are_found_by_their_paths(tmp_path: Path) -> None:
    make(tmp_path, "samples/a.txt", "samples/b.bin", "other/c.txt")
    found = look_at(tmp_path, ["samples/*"])
    assert found.named == ["samples/a.txt"]
    assert list(found.tensors) == ["samples/b.bin"]


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert not look_at(tmp_path / "gone").saved


@given(kills=st.integers(1, 20), seconds=st.floats(0.01, 1e6), seed=st.integers())
def test_every_kill_takes_place_in_a_run_that_loses_no_work(kills: int, seconds: float, seed: int) -> None:
    """Even if each start continued exactly where the one before was killed, none is over before its kill."""
    moments = draw_moments(random.Random(seed), kills, seconds)
    assert len(moments) == kills
    assert min(moments) >= 0
    assert sum(moments) < seconds
    assert moments == draw_moments(random.Random(seed), kills, seconds)


def test_any_moment_of_the_run_is_hit() -> None:
    chance = random.Random(1)
    first = [draw_moments(chance, 3, 100.0) for _ in range(2000)]
    last = [sum(moments) for moments in first]
    assert min(moments[0] for moments in first) < 1
    assert max(last) > 89
    assert 60 < sum(last) / len(last) < 75
