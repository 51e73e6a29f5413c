"""Who may import whom: the walls of the house, as in ARCHITECTURE.md."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rollforward

ROOT = Path(rollforward.__file__).parent
EVERYONE = {
    "rollforward",
    "rollforward.agreement",
    "rollforward.boxes",
    "rollforward.channel",
    "rollforward.errors",
    "rollforward.inputs",
    "rollforward.position",
    "rollforward.tensors",
    "rollforward.wording",
}
FRAMEWORKS = {"mindspore", "torch", "transformers", "tensorflow", "jax"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "agreement": set(),
    "boxes": set(),
    "channel": set(),
    "inputs": set(),
    "position": set(),
    "tensors": set(),
    "wording": set(),
    "storage": set(),
    "store": {"storage"},
    "grpo": set(),
    "replay": {"storage", "store", "grpo.addition", "grpo.types", "grpo.ports"},
    "library": {"storage", "store", "replay"},
    "torch": {"library", "store"},
    "trl": {"library", "storage", "store", "replay", "interop", "torch"},
    "models": set(),
    "interop": {"storage", "store", "models", "grpo.ports"},
    "config": {"storage.address"},
    "data": {"grpo.types"},
    "verifiers": {"grpo.types", "grpo.ports"},
    "processes": {"storage", "store", "engines.base"},
    "inspection": {
        "storage",
        "store",
        "replay",
        "models",
        "interop",
        "data",
        "grpo.types",
        "grpo.advantages",
        "engines.base",
    },
    "proving": {"storage", "store", "interop", "inspection", "processes"},
    "engines": {
        "models",
        "interop.strategy_format",
        "grpo.addition",
        "grpo.packing",
        "grpo.spreading",
        "grpo.types",
        "grpo.ports",
        "grpo.group",
    },
    "run": {
        "storage",
        "store",
        "grpo",
        "replay",
        "models",
        "interop",
        "config",
        "data",
        "verifiers",
        "processes",
        "inspection",
        "engines.base",
    },
    "cli": {
        "storage.address",
        "run",
        "config",
        "processes",
        "inspection",
        "proving",
        "interop",
        "replay",
        "store",
        "engines.base",
        "trl.exporting",
    },
}

LIBRARIES: dict[str, set[str]] = {
    "tensors": {"numpy"},
    "storage": {"obstore"},
    "store": {"numpy", "ml_dtypes", "xxhash"},
    "grpo": {"numpy"},
    "replay": {"numpy"},
    "library": {"numpy"},
    "torch": {"numpy", "ml_dtypes", "torch"},
    "trl": {"numpy", "xxhash", "torch", "transformers", "trl", "accelerate", "datasets", "peft"},
    "models": {"numpy"},
    "interop": {"numpy"},
    "config": {"yaml"},
    "data": {"tokenizers", "jinja2", "reasoning_gym", "yaml", "pyarrow"},
    "verifiers": {"numpy", "math_verify", "reasoning_gym"},
    "inspection": {"numpy"},
    "proving": {"numpy", "torch"},
    "engines": {"numpy", "mindspore", "google"},
    "run": {"numpy", "rich", "tensorboardX"},
    "cli": {"rich"},
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides which room it reaches into"
            assert node.module is not None
            names.add(node.module)
    return names


def ours(name: str) -> bool:
    return name.split(".")[0] == "rollforward"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_reaches_only_into_the_rooms_it_may(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        # For type checkers; whoever imports it at run time gets it late: see test_public_names.
        assert set(filter(ours, imported(path))) == {"rollforward.library"}
        return
    for name in filter(ours, imported(path)):
        if name in EVERYONE or name.split(".")[1] == here:
            continue
        target = name.removeprefix("rollforward.")
        allowed = any(target == door or target.startswith(door + ".") for door in MAY_IMPORT[here])
        assert allowed, (
            f"{path.relative_to(ROOT)} imports {name}; {here} may import {MAY_IMPORT[here] or 'nothing'}"
        )


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_uses_only_the_libraries_it_may(path: Path) -> None:
    here = room(path)
    standard = sys.stdlib_module_names
    for name in imported(path):
        top = name.split(".")[0]
        if top not in standard and top != "rollforward":
            assert top in LIBRARIES.get(here, set()), f"{path.relative_to(ROOT)} imports {name}"


def test_engines_never_reach_into_each_other() -> None:
    engines = [folder for folder in (ROOT / "engines").iterdir() if (folder / "__init__.py").exists()]
    assert engines
    for engine in engines:
        for path in engine.rglob("*.py"):
            for name in imported(path):
                if name.startswith("rollforward.engines."):
                    assert name.split(".")[2] in (engine.name, "base"), f"{path} imports {name}"


def test_no_framework_is_named_outside_its_engine() -> None:
    """Another engine changes nothing but its own room. Files of MindSpore are the business of `interop`."""
    theirs = re.compile(r"(?i:mindspore)(?![\"\]])|\bMS_[A-Z]|GLOG|HCCL|\b8118\b")
    for path in modules():
        if path.is_relative_to(ROOT / "engines" / "mindspore") or room(path) == "interop":
            continue
        found = [line.strip() for line in path.read_text().splitlines() if theirs.search(line)]
        assert found == [], path


@pytest.mark.parametrize(
    "module",
    [
        "store",
        "storage",
        "grpo",
        "grpo.trainer",
        "verifiers",
        "config.loading",
        "replay.recovery",
        "library",
        "cli.main",
    ],
)
def test_importing_it_loads_no_framework(module: str) -> None:
    program = f"import sys, rollforward.{module}; print(' '.join({FRAMEWORKS!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_only_the_storage_room_renames_and_syncs() -> None:
    """One durable-write primitive, used by all."""
    for path in modules():
        if room(path) == "storage":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in {"rename", "replace", "fsync", "fdatasync", "O_SYNC", "O_DSYNC"}, (
                    f"{path}:{node.lineno}: os.{node.attr}"
                )


OPENED_ELSEWHERE = {
    "storage",
    "inputs",
    # Of the system, of the program itself, and of a folder that this process has just made.
    "processes/environment",
    "processes/launch",
    "processes/reports",
    "processes/standby",
    "processes/streams",
    "processes/warden",
    "run/versions",
    "trl/attachments",
    "engines/mindspore/compiling",
    # A folder, to lock it; and a file that it makes there.
    "run/output_folders",
    # Written in place; and tensors of a file that was opened and looked at before.
    "processes/heartbeat",
    "models/weights",
}


def test_files_are_read_through_a_door_that_neither_waits_nor_takes_what_is_too_large() -> None:
    """A named pipe, a device or a sparse file in place of a file must hold nobody up."""
    reading = {"read_bytes", "read_text", "open", "fromfile", "memmap", "load"}
    own = {"os", "Path", "np", "io", "builtins", "json"}
    for path in modules():
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        if name in OPENED_ELSEWHERE or name.split("/")[0] in OPENED_ELSEWHERE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id != "open", f"{path}:{node.lineno}: open"
            elif isinstance(called, ast.Attribute) and called.attr in reading:
                of = called.value.id if isinstance(called.value, ast.Name) else ""
                theirs = called.attr in {"open", "load"} and of not in own
                assert theirs, f"{path}:{node.lineno}: {called.attr}; inputs and storage open files"
                # What is left are the doors' own methods, never those of a path.
                assert called.attr != "open" or not any(
                    isinstance(argument, ast.Constant) and argument.value in {"r", "rb", "a", "w", "wb"}
                    for argument in node.args
                ), f"{path}:{node.lineno}: open"


def test_nothing_is_ever_unpickled() -> None:
    """Data is only data."""
    for path in modules():
        loaded = {name.split(".")[0] for name in imported(path)}
        assert not loaded & {"pickle", "cPickle", "dill", "shelve", "marshal"}, path


def module_of(path: Path) -> str:
    """As it is imported: dotted below the package, by its bare name elsewhere."""
    if path.is_relative_to(ROOT):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return path.stem


def imports_of(path: Path, known: Collection[str]) -> set[str]:
    """The files of the repository that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            found |= names or {node.module}
    return (found & set(known)) - {module_of(path)}


def test_no_two_files_import_each_other_in_a_circle() -> None:
    repository = ROOT.parents[1]
    folders = (ROOT, *(repository / name for name in ("tests", "benchmarks", "examples")))
    files = {module_of(path): path for folder in folders for path in folder.rglob("*.py")}
    graph = {name: imports_of(path, files) for name, path in files.items()}
    assert len(graph["rollforward.run.session"]) > 10, "the graph is not that of the repository"
    tuple(TopologicalSorter(graph).static_order())  # CycleError names the circle
