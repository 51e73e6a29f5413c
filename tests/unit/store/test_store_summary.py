"""A manifest in short says what the whole one says, and costs no more than it must."""

import json
from pathlib import Path

import numpy as np
import pytest

from rollforward.errors import CheckpointInvalid
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Retention, list_checkpoints, load_manifest, versions
from rollforward.store.attachments import copy_of
from rollforward.store.digests import digest
from rollforward.store.pruning import prune
from rollforward.store.summary import Summary, listed_files, summarise

GOLDEN = Path(__file__).parents[2] / "golden" / "store"


def save(store, number, **more):
    state = {
        "policy_model": {"w": np.full(5, number, np.float32), "v": np.full(3, number, np.float32)},
        "ref": {"w": np.zeros(5, np.float32)},
    }
    about = {"run_id": "r", "incarnation": 1, "state": {"metrics": {"reward": number / 2}}, **more}
    return store.save(Position(0, number), state, global_step=number, **about).manifest


@pytest.fixture
def content(tmp_path):
    store = CheckpointStore(tmp_path, retention=Retention(newest=0))
    save(store, 1)
    save(store, 2, attachments={"config.json": b"{}"})
    return (tmp_path / "commits/0_2.json").read_bytes()


def sealed(body: bytes) -> bytes:
    return body + f',"digest":"{digest(body)}"}}\n'.encode()


def counted(monkeypatch) -> list[str]:
    """The names of manifests that are parsed as a whole from now on."""
    names, parse = [], versions.parse
    monkeypatch.setattr(versions, "parse", lambda content, name: names.append(name) or parse(content, name))
    return names


def test_it_says_what_the_whole_manifest_says(content):
    whole = versions.parse(content, "0_2.json")
    found = summarise(content, "0_2.json")
    assert found == Summary.of(whole)
    assert found.generations == {
        ("policy_model", Position(0, 2), 0),
        ("ref", Position(0, 1), 0),
        ("tables", Position(0, 2), 0),
    }
    assert listed_files(content, "0_2.json") == ([*whole.files, *whole.table_files], list(whole.attachments))
    assert (found.metrics, list(found.attachments)) == ({"reward": 1.0}, ["model/config.json"])


@pytest.mark.parametrize("version", [1, 2])
def test_of_an_earlier_version_it_says_the_same_without_parsing_the_tensors(monkeypatch, version):
    content = (GOLDEN / f"version_{version}" / "commits" / "0_20.json").read_bytes()
    whole = versions.parse(content, "0_20.json")
    names = counted(monkeypatch)
    assert summarise(content, "0_20.json") == Summary.of(whole)
    files, attachments = listed_files(content, "0_20.json")
    assert (sorted(files), attachments) == (sorted(whole.files), list(whole.attachments))
    assert names == []


def test_one_in_another_layout_is_looked_at_as_a_whole(monkeypatch):
    content = (GOLDEN / "version_1" / "commits" / "0_20.json").read_bytes()
    value = json.loads(content)
    del value["digest"]
    other = sealed(json.dumps(value, indent=1).encode()[:-2])
    names = counted(monkeypatch)
    assert summarise(other, "0_20.json") == summarise(content, "0_20.json")
    assert sorted(listed_files(other, "0_20.json")[0]) == sorted(listed_files(content, "0_20.json")[0])
    assert names == ["0_20.json", "0_20.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content.replace(b"0_1", b"0_7", 1),
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: content[:-60] + bytes([content[-60] ^ 1]) + content[-59:],
        lambda content: sealed(content[:-46].replace(b'"position":"0_2"', b'"position":"0_3"')),
        lambda content: sealed(content[:-46].replace(b'"state":{', b'"state":[{')),
        lambda content: sealed(content[:-46].replace(b'"version":3', b'"version":2')),
        lambda content: sealed(content[:-46].replace(b'["model/config.json"', b"[7")),
        lambda content: sealed(content[:-46].replace(b'["model/config.json"', b'["../config.json"')),
    ],
)
def test_what_is_no_manifest_has_no_summary(content, damage):
    for look in (summarise, listed_files):
        with pytest.raises(CheckpointInvalid, match=r"manifest 0_2\.json: "):
            look(damage(content), "0_2.json")


@pytest.mark.parametrize(
    "damage", [(b'"world_size":1', b'"world_size":2'), (b'"tables":[\n[', b'"tables":[\n[7,')]
)
def test_whether_the_ranks_are_all_listed_is_seen_where_their_files_matter(content, damage):
    assert summarise(sealed(content[:-46].replace(*damage)), "0_2.json").position == Position(0, 2)
    with pytest.raises(CheckpointInvalid, match=r"manifest 0_2\.json: "):
        listed_files(sealed(content[:-46].replace(*damage)), "0_2.json")


def damage_manifest(run, number):
    path = run / f"commits/0_{number}.json"
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_file(run, number):
    (run / f"train/rank_0/policy_model_rank_0-0_{number}.safetensors").unlink()


def cut_a_file(run, number):
    path = run / f"train/rank_0/policy_model_rank_0-0_{number}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_an_attachment(run, number):
    path = load_manifest(LocalStorage(run), Position(0, number)).attachments[0].path
    for copy in (path, copy_of(path)):
        (run / copy).unlink()


def lose_a_table(run, number):
    (run / f"tables/rank_0/table_rank_0-0_{number}.json").unlink()


HURTS = [damage_manifest, lose_a_file, cut_a_file, lose_a_table, lose_an_attachment]


@pytest.mark.parametrize("hurt", HURTS)
def test_a_checkpoint_that_is_not_whole_does_not_take_the_place_of_one_that_is(tmp_path, hurt):
    for number in range(1, 5):
        attachments = {"config.json": f"{number}".encode()}
        save(CheckpointStore(tmp_path, retention=Retention(newest=0)), number, attachments=attachments)
    hurt(tmp_path, 4)
    hurt(tmp_path, 3)
    save(CheckpointStore(tmp_path, retention=Retention(newest=2)), 5)
    found = {info.position.step: info.valid for info in list_checkpoints(LocalStorage(tmp_path))}
    assert found == {5: True, 4: False, 3: False, 2: True}


def test_a_forged_manifest_never_costs_the_last_checkpoint_that_is_whole(tmp_path):
    for number in range(1, 4):
        save(CheckpointStore(tmp_path, retention=Retention(newest=0)), number)
    for number in (2, 3):
        path = tmp_path / f"commits/0_{number}.json"
        path.write_bytes(sealed(path.read_bytes()[:-46].replace(b'"attempt":0', b'"attempt":-1')))
    assert prune(LocalStorage(tmp_path), Retention(newest=1)) == []
    found = {info.position.step: info.valid for info in list_checkpoints(LocalStorage(tmp_path), deep=True)}
    assert found == {3: False, 2: False, 1: True}


def test_files_of_a_manifest_that_cannot_be_understood_stay(tmp_path):
    manifest = save(CheckpointStore(tmp_path), 1)
    path = tmp_path / "commits/0_1.json"
    path.write_bytes(path.read_bytes()[:-1])
    save(CheckpointStore(tmp_path), 2)
    assert all((tmp_path / file.path).exists() for file in manifest.files)
