"""No two files import each other in a circle, however late and wherever in a file the import stands."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROOTS = ("src", "benchmarks", "examples", "scripts", "tests/conformance", "tests/crash", "tests/e2e")
"""Folders whose files import each other; names are taken relative to these."""

Imports = Mapping[str, set[str]]
"""Module -> the modules that it imports."""


def modules() -> dict[str, Path]:
    found = {}
    for root in ROOTS:
        for path in (REPOSITORY / root).rglob("*.py"):
            name = ".".join(path.relative_to(REPOSITORY / root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports() -> Imports:
    """A name that is taken from a package counts as the module of that name where there is one."""
    files = modules()
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {name if name in files else node.module for name in inner}
        found[module] = (named & files.keys()) - {module}
    return found


def circles(graph: Imports) -> Iterator[list[str]]:
    """Chains of modules of which each imports the next and the last imports the first."""
    done: set[str] = set()

    def follow(module: str, chain: list[str]) -> Iterator[list[str]]:
        if module in chain:
            yield chain[chain.index(module) :]
        elif module not in done:
            for following in sorted(graph[module]):
                yield from follow(following, [*chain, module])
            done.add(module)

    for module in sorted(graph):
        yield from follow(module, [])


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = imports()
    assert graph["rollforward.store.catalog"] >= {"rollforward.store.restoring", "rollforward.store.manifest"}
    assert [" -> ".join(circle) for circle in circles(graph)] == []


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}}, [["a", "b"]]),
        ({"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": {"c"}}, [["c", "d"]]),
    ],
)
def test_a_circle_would_be_found(graph: Imports, found: list[list[str]]) -> None:
    assert list(circles(graph)) == found
