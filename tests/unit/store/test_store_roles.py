"""Roles that the contract does not have: named freely, and treated in everything like the others."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lockstep import LockStep
from simulated_disk import SimulatedDisk

from rollforward.errors import NothingToResume
from rollforward.inspection.comparing import diff
from rollforward.inspection.verifying import verify_checkpoints
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Retention, find, list_checkpoints, restore_into
from rollforward.store.catalog import positions
from rollforward.store.guests import adopt
from rollforward.store.layout import RESERVED, ROLE_FOLDERS, TensorFileName, check_roles, is_role
from rollforward.store.meta import parse_meta
from rollforward.store.pruning import plan, prune


@pytest.fixture
def storage():
    return LocalStorage("/run", SimulatedDisk())


def state(step, *roles):
    """Each role has a tensor that changes at every step, but `frozen`."""
    return {role: {"w": np.full(4, 0 if role == "frozen" else step, np.float32)} for role in roles}


def save(storage, step, *roles, newest=0, incarnation=1, **options):
    store = CheckpointStore(storage, retention=Retention(newest=newest), **options)
    return store.save(
        Position(0, step),
        state(step, *roles),
        global_step=step,
        run_id="r",
        incarnation=incarnation,
        state={},
        attachments={"config.json": b"{}"},
    )


def files(storage, folder):
    return [entry.name for entry in storage.scan(folder)]


def test_any_role_is_saved_found_and_restored(storage):
    manifest = save(storage, 3, "critic", "policy_model", "reward_model2").manifest
    assert [file.path for file in manifest.files] == [
        "train/rank_0/policy_model_rank_0-0_3.safetensors",
        "critic/rank_0/critic_rank_0-0_3.safetensors",
        "reward_model2/rank_0/reward_model2_rank_0-0_3.safetensors",
    ]
    found = find(storage).manifest
    assert found == manifest
    into = {role: {"w": np.zeros(4, np.float32)} for role in found.roles}
    assert restore_into(storage, found, into) == 3 * 16
    assert all(named["w"].tolist() == [3] * 4 for named in into.values())
    meta = parse_meta(storage._ops.tree()["/run/critic/rank_0/meta.json"])
    assert (meta.position, meta.file) == (Position(0, 3), "critic_rank_0-0_3.safetensors")


def test_several_ranks_share_a_free_role(storage):
    def body(rank, exchange):
        return save(storage, 1, "critic", rank=rank, world_size=3, exchange=exchange).manifest

    manifests_of_ranks = LockStep(3).run(body)
    assert len({manifest.digest for manifest in manifests_of_ranks}) == 1
    assert [verdict.reason for verdict in verify_checkpoints(storage)] == [""]
    assert all(files(storage, f"critic/rank_{rank}") for rank in range(3))


@pytest.mark.parametrize(
    "role", ["", "Critic", "1st", "_x", "a-b", "a.b", "a/b", "../x", "a b", "a" * 41, "krítik", "critic\n", 7]
)
def test_what_cannot_be_a_role_is_refused_with_what_can(storage, role):
    with pytest.raises(ValueError, match="cannot be the name of a role: a small letter comes first"):
        save(storage, 1, "policy_model", role)
    assert storage._ops.tree() == {}


@pytest.mark.parametrize("role", [*sorted(RESERVED), "rank_0", "rank_12"])
def test_a_folder_of_the_run_is_no_role(storage, role):
    with pytest.raises(ValueError, match=f"'{role}' cannot be the name of a role, since a run keeps"):
        save(storage, 1, role)
    assert storage._ops.tree() == {}


def test_the_folders_that_a_run_has_are_reserved():
    used = {"commits", "journal", "model", "train", "heartbeat", "evidence", "strategy", "log", "tensorboard"}
    assert used | {"compile_cache"} <= RESERVED
    assert set(ROLE_FOLDERS.values()) <= RESERVED | ROLE_FOLDERS.keys()
    check_roles(ROLE_FOLDERS)


@given(
    st.from_regex(r"[a-z][a-z0-9_]{0,39}", fullmatch=True).filter(is_role),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 999_999),
)
def test_the_name_of_a_file_of_any_role_is_read_back(role, rank, step, attempt):
    """Also of one that is named like a part of a file's name."""
    for name in (role, f"{role[:30]}_rank_0"):
        whole = TensorFileName(name, rank, Position(0, step), attempt)
        assert TensorFileName.parse(whole.path) == whole
        assert TensorFileName.parse(whole.path.replace(f"{name}/", "other/", 1)) is None


def test_old_files_of_free_roles_go_with_their_checkpoints(storage):
    previous = None
    for step in (1, 2, 3):
        previous = save(storage, step, "critic", "frozen", newest=2, previous=previous).manifest
    assert files(storage, "critic/rank_0") == [f"critic_rank_0-0_{step}.safetensors" for step in (2, 3)] + [
        "meta.json"
    ]
    assert files(storage, "frozen/rank_0") == ["frozen_rank_0-0_1.safetensors", "meta.json"]
    assert [item.valid for item in list_checkpoints(storage, deep=True)] == [True, True]


def test_what_an_interrupted_save_left_of_a_free_role_is_cleaned_up(storage):
    storage.write("critic/rank_0/critic_rank_0-0_9.safetensors", [b"half"])
    storage.write("critic/rank_0/.critic_rank_0-0_9.safetensors.0123abcd.tmp", [b"half"])
    storage.write("critic/rank_5/critic_rank_5-0_9.safetensors", [b"of a start with more workers"])
    save(storage, 1, "critic")
    assert files(storage, "critic/rank_0") == ["critic_rank_0-0_1.safetensors", "meta.json"]
    assert files(storage, "critic/rank_5") == []


def test_the_files_of_a_role_that_is_no_longer_saved_go_with_the_last_checkpoint_that_has_it(storage):
    save(storage, 1, "critic")
    store = CheckpointStore(storage, retention=Retention(newest=1))
    store.save(Position(0, 2), state(2, "value"), global_step=2, run_id="r", incarnation=1, state={})
    assert files(storage, "critic/rank_0") == ["meta.json"]
    assert files(storage, "value/rank_0") == ["meta.json", "value_rank_0-0_2.safetensors"]


def test_a_folder_of_the_users_that_looks_like_a_roles_is_never_touched(storage):
    """No manifest names the role and nobody saves it: whose it is cannot be known, so it stays."""
    theirs = {
        "notes/rank_0/notes_rank_0-0_1.safetensors": b"mine",
        "notes/rank_0/.notes_rank_0-0_1.safetensors.0123abcd.tmp": b"mine",
        "notes/rank_7/notes_rank_7-0_1.safetensors": b"mine",
        "critic/readme.txt": b"mine",
        "critic/rank_0/best.safetensors": b"mine",
        "critic/rank_0/policy_model_rank_0-0_1.safetensors": b"mine",
    }
    for path, content in theirs.items():
        storage.write(path, [content])
    for step in (1, 2, 3):
        save(storage, step, "policy_model", "critic", newest=1)
    assert [item.name for item in plan(storage, Retention(newest=1))] == []
    prune(storage, Retention(newest=1))
    tree = storage._ops.tree()
    assert {path: tree[f"/run/{path}"] for path in theirs} == theirs


def test_while_a_manifest_with_a_free_role_cannot_be_read_its_files_stay(storage):
    for step in (1, 2):
        save(storage, step, "critic")
    storage.write("commits/0_1.json", [b"damaged"])
    save(storage, 3, "critic", newest=1)
    # 0_1 may be nearly whole: only the manifest says so, and while it lies there its files do too.
    kept = [str(position) for position in positions(storage)]
    for position in kept:
        assert f"critic_rank_0-{position}.safetensors" in files(storage, "critic/rank_0")
    assert "0_3" in kept


def test_the_prune_verb_names_and_removes_files_of_free_roles(storage):
    for step in (1, 2):
        save(storage, step, "critic")
    storage.write("critic/rank_0/critic_rank_0-0_9.safetensors", [b"half"])
    planned = plan(storage, Retention(newest=1))
    assert [(item.what, item.name) for item in planned] == [
        ("checkpoint", "0_1"),
        ("file", "critic/rank_0/critic_rank_0-0_9.safetensors"),
    ]
    assert planned[0].size > 0
    assert prune(storage, Retention(newest=1)) == []
    assert files(storage, "critic/rank_0") == ["critic_rank_0-0_2.safetensors", "meta.json"]
    assert plan(storage, Retention(newest=1)) == []


def test_files_of_another_trainer_in_a_folder_of_any_role_are_guests(storage):
    path = "critic/rank_0/critic_rank_0-0_1.safetensors"
    storage.write(path, [b"theirs"])
    storage.write("critic/rank_0/meta.json", [b"{}"])
    assert adopt(storage) == 1
    assert json.loads(storage._ops.tree()["/run/guests.json"])["guests"] == [["critic", "0_1"]]
    for step in (1, 2):
        save(storage, step, "critic", newest=1)
    assert storage._ops.tree()[f"/run/{path}"] == b"theirs"


def test_diff_names_the_role(storage):
    first, second = (save(storage, step, "critic", "frozen").manifest for step in (1, 2))
    assert [(item.role, item.what, item.elements) for item in diff(storage, first, storage, second)] == [
        ("critic", "values", 4)
    ]


def test_where_nothing_can_be_resumed_files_of_free_roles_are_listed(storage):
    save(storage, 1, "critic")
    storage.remove("commits/0_1.json")
    storage.write("notes/a.txt", [b""])
    with pytest.raises(NothingToResume, match=r"critic/rank_0: critic_rank_0-0_1\.safetensors") as caught:
        find(storage)
    assert "train/: no rank folders" in caught.value.message
    assert "notes" not in caught.value.message
