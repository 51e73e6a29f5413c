"""verify, inspect, doctor and the resume say the same of every checkpoint, whatever is done to a folder.

Folders are damaged as in `test_damage`, and by links, which only a real file system has. Each is then looked
at by all of them, as the command line does.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from crash_run import ROOT, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_damage import DAMAGE, WHOLE

from rollforward.cli.main import main
from rollforward.errors import CheckpointInvalid, NothingToResume
from rollforward.interop.resuming import is_foreign
from rollforward.interop.role_folders import name_checkpoint_folders
from rollforward.interop.traces import lost_commits
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Retention, find, read_tensors
from rollforward.store.cleaning import Inventory
from rollforward.store.judging import why_not_intact, why_not_valid
from rollforward.store.restoring import read_attachments

CASES = 4


def put(tree, folder: Path) -> Path:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    for path, content in tree.items():
        if not path.startswith(ROOT):
            continue
        place = run / path.removeprefix(ROOT).lstrip("/")
        if content is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    return run


def said_by(capsys, *arguments: str) -> tuple[int, dict]:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out)


def by_verb(capsys, run: Path, *verb: str) -> dict[str, bool]:
    _, said = said_by(capsys, *verb, str(run))
    return {item["position"]: item["valid"] for item in said["checkpoints"]}


def by_doctor(capsys, run: Path) -> dict[str, bool]:
    _, said = said_by(capsys, "doctor", "--actor-checkpoint-path", str(run / "train"))
    found = {}
    for finding in said["findings"]:
        position = finding["text"].partition(",")[0].partition(":")[0]
        if finding["check"] == "checkpoints" and "_" in position and position[0].isdigit():
            found[position] = finding["level"] == "ok"
    return found


def by_resume(run: Path) -> dict[str, bool]:
    """What a resume would come to, were each checkpoint the newest that is left."""
    storage, rejected, found = LocalStorage(run), [], {}
    while True:
        try:
            chosen = find(storage, skip=rejected)
        except NothingToResume:
            return dict.fromkeys(_positions(run), False) | found
        for item in chosen.rejected:
            found.setdefault(str(item.position), False)
        position = chosen.manifest.position
        try:
            for _ in read_tensors(storage, chosen.manifest):
                pass
            read_attachments(storage, chosen.manifest)
        except CheckpointInvalid:
            found[str(position)] = False
        else:
            found[str(position)] = True
        rejected.append(position)


def _positions(run: Path) -> set[str]:
    return {path.stem for path in (run / "commits").glob("*_*.json") if not path.name.startswith(".")}


def compare_refusals(capsys, run: Path) -> None:
    """All of them on a folder whose manifests are all gone."""
    capsys.readouterr()
    for verb in (["verify"], ["verify", "--deep"], ["inspect"], ["inspect", "--deep"]):
        assert main([*verb, str(run), "--json"]) == NothingToResume.exit_code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "manifests are gone" in captured.err
    code, said = said_by(capsys, "doctor", "--actor-checkpoint-path", str(run / "train"))
    assert code == 1
    assert any("are gone: there is none in commits/" in finding["text"] for finding in said["findings"])


def compare(capsys, run: Path) -> dict[str, bool]:
    """All of them on one folder; returns what they agree on."""
    if not (run / "commits").is_dir():
        return {}
    storage = LocalStorage(run)
    resume = by_resume(run)
    if lost_commits(name_checkpoint_folders("", "", run)):
        assert resume == {}
        compare_refusals(capsys, run)
        return resume
    assert by_verb(capsys, run, "verify", "--deep") == resume
    assert by_verb(capsys, run, "inspect", "--deep") == resume
    assert by_doctor(capsys, run) == resume
    parsed = [Position.parse(position) for position in resume]
    assert {str(at): why_not_intact(storage, at) is None for at in parsed} == resume
    shallow = by_verb(capsys, run, "verify")
    assert by_verb(capsys, run, "inspect") == shallow
    assert {str(at): why_not_valid(storage, at) is None for at in parsed} == shallow
    assert all(shallow[position] for position, valid in resume.items() if valid)
    code, said = said_by(capsys, "verify", "--deep", str(run))
    assert code == (1 if said["problems"] else 0)
    assert said["problems"] >= sum(not valid for valid in resume.values())
    if code:
        assert said_by(capsys, "doctor", "--actor-checkpoint-path", str(run / "train"))[0] == 1
    if resume:
        assert not is_foreign(name_checkpoint_folders(str(run), "", run))
    Inventory(storage).removable(Retention(newest=1))
    return resume


@settings(max_examples=200 // CASES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False)
@given(data=st.data())
def test_of_damaged_folders(data, tmp_path_factory, capsys):
    for _ in range(CASES):
        tree = dict(WHOLE)
        for damage in data.draw(st.lists(st.sampled_from(DAMAGE), min_size=1, max_size=3)):
            damage(tree, data.draw)
        run = put(tree, tmp_path_factory.getbasetemp())
        compare(capsys, run)


def link_away(path: Path) -> None:
    """The thing itself goes elsewhere, and a link stands for it."""
    away = path.parents[len(path.parts) - 1 - path.parts.index("run")] / "away"
    shutil.rmtree(away, ignore_errors=True)
    away.mkdir()
    path.rename(away / path.name)
    path.symlink_to(away / path.name)


def two_checkpoints(folder: Path) -> Path:
    run = folder / "run"
    store = CheckpointStore(run, retention=Retention(newest=0))
    for step in (4, 5):
        save(store, 1, step)
    return run


@pytest.mark.parametrize(
    ("what", "valid"),
    [
        ("train", {"0_4": False, "0_5": False}),
        ("train/rank_0", {"0_4": False, "0_5": False}),
        ("critic/rank_0/critic_rank_0-0_5.safetensors", {"0_4": True, "0_5": False}),
        ("commits/0_5.json", {"0_4": True, "0_5": False}),
        ("commits", {"0_4": False, "0_5": False}),
        ("model/config.json", {"0_4": True, "0_5": True}),
        ("model", {"0_4": True, "0_5": True}),
        ("train/rank_0/meta.json", {"0_4": True, "0_5": True}),
    ],
)
def test_of_folders_with_links(tmp_path, capsys, what, valid):
    run = two_checkpoints(tmp_path)
    link_away(run / what)
    assert compare(capsys, run) == valid


def test_of_a_folder_without_any_manifest(tmp_path, capsys):
    run = two_checkpoints(tmp_path)
    assert set(compare(capsys, run).values()) == {True}
    for path in (run / "commits").glob("*.json"):
        path.unlink()
    assert lost_commits(name_checkpoint_folders("", "", run))
    assert compare(capsys, run) == {}


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to nothing", "link to itself"])
@pytest.mark.parametrize("what", ["commits/0_5.json", "train/rank_0/policy_model_rank_0-0_5.safetensors"])
def test_of_folders_in_which_a_file_is_something_else(tmp_path, capsys, what, kind):
    run = two_checkpoints(tmp_path)
    path = run / what
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "link to itself" else "nothing")
    assert compare(capsys, run) == {"0_4": True, "0_5": False}


def test_of_a_run_reached_by_a_link(tmp_path, capsys):
    two_checkpoints(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert compare(capsys, tmp_path / "link") == {"0_4": True, "0_5": True}
