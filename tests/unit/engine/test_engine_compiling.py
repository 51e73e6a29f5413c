"""A kept graph is used only whole, and only as itself, whatever a start compiles, and in which order."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from engine_case import SETTINGS

from rollforward.engines.mindspore.compiling import Graphs
from rollforward.grpo.group import OneProcess

SCRIPT = Path(__file__).with_name("graphs_process.py")
EXPECTED = {
    "times_3": 60.0,
    "times_4": 80.0,
    "times_5": 100.0,
    "plus-4": 6.0,
    "plus-9": 11.0,
    "unkept": 140.0,
}
"""What each graph computes."""
BOTH = ["times_3", "times_4"]


def start(folder: Path, *names: str, known: int = 0) -> dict[str, bool]:
    """A process that compiles these, in order; name -> whether it was taken. What it computes is checked."""
    done = subprocess.run(
        command_of(folder, *names, known=known),
        env=os.environ | {"GLOG_v": "3"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: value for name, (value, _) in found.items()} == {
        name: EXPECTED[name] for name in (*names, "unkept")
    }
    return {name: found[name][1] for name in names}


def command_of(folder: Path, *names: str, known: int = 0) -> list[str]:
    return [sys.executable, str(SCRIPT), str(folder), str(known), *names]


def kept_in(folder: Path) -> dict[str, Path]:
    """Name of each kept graph -> its file."""
    return {path.name.split(".")[0]: path for path in folder.glob("*/*.mindir")}


def test_graphs_are_taken_in_any_order_and_after_a_new_one_none_is_mistaken_for_another(
    tmp_path: Path,
) -> None:
    assert start(tmp_path, "times_3", "plus-4", "times_4") == dict.fromkeys(
        ["times_3", "plus-4", "times_4"], False
    )
    assert kept_in(tmp_path).keys() == {"times_3", "plus-4", "times_4"}
    assert start(tmp_path, "times_4", "times_3") == {"times_4": True, "times_3": True}
    # In mid-run comes a shape that no start has needed; the next start knows it.
    first = start(tmp_path, "times_4", "plus-9", "times_5", known=1)
    assert first == {"times_4": True, "plus-9": False, "times_5": False}
    names = ["times_5", "plus-9", "times_4", "plus-4", "times_3"]
    assert start(tmp_path, *names, known=1) == dict.fromkeys(names, True)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == len(names) + 1, "one each, and what MindSpore notes of the script"


@pytest.fixture(scope="module")
def both_kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of `BOTH`; for copies of it."""
    folder = tmp_path_factory.mktemp("kept")
    start(folder, *BOTH)
    return folder


@pytest.mark.parametrize("damage", ["cut off", "changed", "another's", "another's with its digest"])
def test_a_damaged_graph_is_compiled_again(both_kept: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(both_kept, tmp_path, dirs_exist_ok=True)
    damaged, other = kept_in(tmp_path)["times_3"], kept_in(tmp_path)["times_4"]
    content = damaged.read_bytes()
    match damage:
        case "cut off":
            damaged.write_bytes(content[: len(content) // 2])
        case "changed":
            damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "another's":
            damaged.write_bytes(other.read_bytes())
        case "another's with its digest":
            damaged.unlink()
            other.rename(other.with_name(other.name.replace("times_4", "times_3")))
    assert start(tmp_path, *BOTH)["times_3"] is False
    assert start(tmp_path, *BOTH) == dict.fromkeys(BOTH, True)


def test_what_a_killed_start_leaves_is_right_or_not_used(tmp_path: Path) -> None:
    names = ["times_3", "plus-4", "times_4", "plus-9", "times_5"]
    for count in range(len(names)):
        process = subprocess.Popen(command_of(tmp_path, *names, known=1), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 600
        while len(kept_in(tmp_path)) < count and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kept_in(tmp_path)
    start(tmp_path, *names, known=1)
    assert start(tmp_path, *reversed(names), known=1) == dict.fromkeys(names, True)


def test_a_graph_of_parameters_with_other_names_is_not_used(both_kept: Path, tmp_path: Path) -> None:
    """MindSpore would take it, and compute with zeros for those that it does not find."""
    shutil.copytree(both_kept, tmp_path, dirs_exist_ok=True)
    assert start(tmp_path, "times_3", known=2) == {"times_3": False}


def test_a_folder_that_cannot_be_written_holds_nothing_up(tmp_path: Path) -> None:
    (tmp_path / "graphs").write_bytes(b"not a folder")
    assert start(tmp_path / "graphs", "times_3", "plus-4") == {"times_3": False, "plus-4": False}


def test_other_numbers_have_a_folder_of_their_own(tmp_path: Path) -> None:
    """MindSpore compares sources only: a constant that was compiled in would silently stay."""

    def folder_of(**changes: object) -> Path | None:
        settings = replace(SETTINGS, compile_cache_folder=str(tmp_path), **changes)
        return Graphs(settings, OneProcess()).folder

    one = folder_of()
    assert one is not None
    assert folder_of(sampling=replace(SETTINGS.sampling, temperature=0.5)) != one
    assert folder_of(policy_folder="elsewhere") == one
    assert list(tmp_path.iterdir()) == [], "an engine that is only made leaves nothing behind"


def test_two_graphs_of_one_name_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(command_of(tmp_path, "times_3", "times_3"), capture_output=True, check=False)
    assert done.returncode == 1
    assert b"there are two graphs named 'times_3'" in done.stderr
