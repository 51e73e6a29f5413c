"""Kept graphs are used only when they are whole, and only for what they were made from."""

from dataclasses import replace
from pathlib import Path

import pytest
from engine_case import SETTINGS

from rollforward.engines.mindspore.compiling import kept_graphs
from rollforward.grpo.group import OneProcess
from rollforward.grpo.types import EngineSettings

GROUP = OneProcess()


def compile_into(root: Path, settings: EngineSettings = SETTINGS) -> Path:
    """Stand in for MindSpore, which puts files into the folder; returns the one of these settings."""
    with kept_graphs(settings, GROUP, root) as folder:
        (folder / "graph.mindir").write_bytes(b"compiled")
    return folder


def found_on_entering(root: Path) -> list[bytes]:
    with kept_graphs(SETTINGS, GROUP, root) as folder:
        return [path.read_bytes() for path in folder.glob("graph.mindir")]


def test_whole_graphs_are_kept(tmp_path: Path) -> None:
    compile_into(tmp_path)
    assert found_on_entering(tmp_path) == [b"compiled"]


def test_graphs_that_were_damaged_are_not_used(tmp_path: Path) -> None:
    folder = compile_into(tmp_path)
    (folder / "graph.mindir").write_bytes(b"compilex")
    assert found_on_entering(tmp_path) == []


def test_graphs_of_a_process_that_did_not_finish_are_not_used(tmp_path: Path) -> None:
    folder = compile_into(tmp_path)
    (folder / "digests.json").unlink()
    assert found_on_entering(tmp_path) == []


def test_a_compilation_that_fails_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    def fail() -> None:
        with kept_graphs(SETTINGS, GROUP, tmp_path) as folder:
            (folder / "graph.mindir").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert found_on_entering(tmp_path) == []


def test_other_numbers_have_a_folder_of_their_own(tmp_path: Path) -> None:
    """MindSpore compares sources only: a constant that was compiled in would silently stay."""
    one = compile_into(tmp_path)
    warmer = replace(SETTINGS, sampling=replace(SETTINGS.sampling, temperature=0.5))
    assert compile_into(tmp_path, warmer) != one
    assert compile_into(tmp_path, replace(SETTINGS, policy_folder="elsewhere")) == one
