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
from mindspore import nn

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


def cut_off(file: Path, _: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def changed(file: Path, _: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def anothers(file: Path, other: Path) -> None:
    file.write_bytes(other.read_bytes())


def anothers_with_its_digest(file: Path, other: Path) -> None:
    file.unlink()
    shutil.copy(other, file.with_name(file.name.partition(".")[0] + "." + other.name.partition(".")[2]))


def test_a_damaged_graph_is_compiled_again_and_kept(tmp_path: Path) -> None:
    """Two in turn: a start that finds one damaged takes the other, which the start before had to compile."""
    damaged, other = "times_3", "times_4"
    start(tmp_path, damaged, other)
    for damage in (cut_off, changed, anothers, anothers_with_its_digest):
        kept = kept_in(tmp_path)
        damage(kept[damaged], kept[other])
        assert start(tmp_path, other, damaged) == {other: True, damaged: False}, damage.__name__
        damaged, other = other, damaged
    assert start(tmp_path, damaged, other) == {damaged: True, other: True}
    # With parameters of other names MindSpore would take it, and compute with zeros for what it does not find
    assert start(tmp_path, "times_3", known=2) == {"times_3": False}


def test_what_a_killed_start_leaves_is_right_or_not_used(tmp_path: Path) -> None:
    names = ["times_3", "plus-4", "times_4", "plus-9"]
    for count in (0, 1, 3):
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
    graphs = Graphs(replace(SETTINGS, compile_cache_folder=str(tmp_path)), OneProcess())
    graphs.taken["times_3"] = False
    with pytest.raises(ValueError, match="there are two graphs named 'times_3'"):
        graphs.compile("times_3", nn.Cell())
