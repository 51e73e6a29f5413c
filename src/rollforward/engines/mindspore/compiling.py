"""Compiled graphs: each compiled when it is first needed, and kept between starts of a run.

    graphs = Graphs(settings, group)
    graphs.compile("norm", cell)              now, or taken from the folder
    learn = graphs.by_shape("learn", make)    make(rows, columns) -> the cell, and arguments of that shape
    graphs.compile_kept()                     the shapes that earlier starts needed
    learn.at(4, 96)                           the cell of a shape; a new one is compiled here, in mid-run

A bug of MindSpore (seen in 2.10) decides how they are kept: its compile cache identifies a graph only as the
n-th that a process compiles. A process that compiles the same graphs in another order gets the wrong ones,
without an error and with wrong numbers; so does one whose graphs have other constants compiled in, since
only the source files are compared.

So graphs do not stay in MindSpore's cache. It is a folder that, while a graph is compiled, holds the file of
this graph or none: whichever number MindSpore looks for, it finds the right graph or nothing. The graphs stay
beside it, as NAME.DIGEST.mindir. The name says what the graph is. The digest is that of the name, of the
parameters' names and shapes, since a graph that does not find one by its name gets zeros instead, and of the
bytes: a file that was cut off, changed or renamed is not used. Each set of settings, versions, workers and
sources has a folder of its own.

Two more things about MindSpore's cache. It is set to a folder once in a process. And after the first graph
that it did not find, or when the script that started the process changed, it takes none any more, but still
writes. So kept graphs are compiled before new ones, and MindSpore always sees the same script: a file of ours
that imports nothing.
"""

import gc
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import mindspore as ms
from mindspore import nn
from mindspore.graph import api

from rollforward.grpo.ports import Group
from rollforward.grpo.types import EngineSettings
from rollforward.inputs import read_input

_GRAPH = "compile_cache_"
_SUFFIX = ".mindir"
_SCRIPT = str(Path(__file__).with_name("__init__.py"))
_DEPENDENCIES = "compile_dependency.hash"
"""What MindSpore writes of the script, and wants to find again. Kept under the same name."""
_MOST = 1 << 30
"""Bytes of a graph's file that are read."""
_SOURCES = ("engines/mindspore", "models", "grpo")
"""Below the package: what graphs are made from."""

CellT = TypeVar("CellT", bound=nn.Cell)


class Graphs:
    """The graphs of an engine, kept in its settings' `compile_cache_folder`.

    If that is None nothing is kept, and MindSpore compiles a graph when it is first run.
    """

    def __init__(self, settings: EngineSettings, group: Group) -> None:
        self.folder: Path | None = None
        """Where the graphs of this worker are kept."""
        self._kept: _Kept | None = None
        if settings.compile_cache_folder is not None:
            root = Path(settings.compile_cache_folder).absolute()
            self.folder = root / f"{_key(settings, group.world_size)}-{group.rank}"
            self._kept = _Kept(self.folder, group.rank)
        self.kinds: list[ByShape] = []
        """What `by_shape` gave."""
        self.taken: dict[str, bool] = {}
        """Name of each graph that was compiled here -> whether it was taken from the folder."""

    def compile(self, name: str, cell: nn.Cell, *arguments: ms.Tensor) -> None:
        """Compile a cell for these arguments. No two graphs of an engine may have one name."""
        if name in self.taken:
            raise ValueError(f"there are two graphs named {name!r}")
        if self._kept is not None:
            self.taken[name] = self._kept.compile(name, cell, arguments)

    def by_shape(
        self, name: str, make: Callable[..., tuple[CellT, tuple[ms.Tensor, ...]]]
    ) -> "ByShape[CellT]":
        """Graphs of one kind, one for each shape. `make(*shape)`: the cell, and arguments of that shape."""
        self.kinds.append(ByShape(self, name, make))
        return self.kinds[-1]

    def compile_kept(self) -> None:
        """Compile the graphs by shape that the folder has: those that earlier starts needed."""
        if self._kept is None:
            return
        for name in self._kept.names():
            kind, _, shape = name.partition("-")
            sizes = shape.split("x")
            for known in self.kinds:
                if known.name == kind and all(size.isdecimal() for size in sizes):
                    known.at(*map(int, sizes))


@dataclass
class ByShape(Generic[CellT]):
    """One cell for each shape, made and compiled when it is first asked for. See `Graphs.by_shape`."""

    graphs: Graphs
    name: str
    make: Callable[..., tuple[CellT, tuple[ms.Tensor, ...]]]
    made: dict[tuple[int, ...], CellT] = field(default_factory=dict)

    def at(self, *shape: int) -> CellT:
        """The cell of this shape."""
        if shape not in self.made:
            cell, arguments = self.make(*shape)
            self.graphs.compile(f"{self.name}-{'x'.join(map(str, shape))}", cell, *arguments)
            self.made[shape] = cell
        return self.made[shape]


class _Kept:
    """The graphs in a folder of this worker. What cannot be kept is compiled again by the next start."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank

    def names(self) -> list[str]:
        """Of the graphs that are there, whole or not."""
        return sorted({path.name.split(".")[0] for path in self._folder.glob(f"*{_SUFFIX}")})

    def compile(self, name: str, cell: nn.Cell, arguments: tuple[ms.Tensor, ...]) -> bool:
        """Compile the cell and keep its graph; whether it was taken from the folder instead."""
        salt = "\n".join([name, *(f"{each.name} {each.shape}" for each in cell.get_parameters())]).encode()
        graph = self._find(name, salt)
        scratch = _Scratch.of_process(self._folder, self._rank)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            scratch.lay_out(graph, _content(self._folder / _DEPENDENCIES))
        except OSError:
            _compile(cell, arguments)
            return False
        with scratch.in_use():
            _compile(cell, arguments)
        found = scratch.take_in()
        with suppress(OSError):
            if found.dependencies is not None:
                (self._folder / _DEPENDENCIES).write_bytes(found.dependencies)
            if graph is None and found.graph is not None:
                (self._folder / _file_of(name, salt, found.graph)).write_bytes(found.graph)
        return graph is not None and found.graph is None

    def _find(self, name: str, salt: bytes) -> bytes | None:
        """The bytes of a graph. A file that is not what its name says, is removed."""
        for path in sorted(self._folder.glob(f"{name}.*{_SUFFIX}")):
            content = _content(path)
            if content is not None and path.name == _file_of(name, salt, content):
                return content
            with suppress(OSError):
                path.unlink()
        return None


@dataclass(frozen=True)
class _Written:
    """What MindSpore wrote while it compiled; None: it left what was laid out."""

    graph: bytes | None
    dependencies: bytes | None


class _Scratch:
    """MindSpore's cache: a folder with the file of the graph to be compiled, or none."""

    _only: ClassVar["_Scratch | None"] = None

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        # Whether MindSpore counts ranks depends on how it was started.
        self._places = [folder / f"rank_{each}" / "graph_cache" for each in sorted({0, rank})]
        # Where there are several workers it puts their role before each name.
        self._role = os.environ.get("MS_ROLE", "")
        self._next = 0
        self._laid_out: dict[Path, tuple[int, int]] = {}

    @classmethod
    def of_process(cls, folder: Path, rank: int) -> "_Scratch":
        """The one that MindSpore was given, or is given now: below this folder."""
        if cls._only is None:
            cls._only = cls(folder / "compiling", rank)
        return cls._only

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """MindSpore's cache is on."""
        script = api.entry_script_path
        ms.set_context(enable_compile_cache=True, compile_cache_path=str(self._folder))
        api.entry_script_path = _SCRIPT
        try:
            yield
        finally:
            api.entry_script_path = script
            ms.set_context(enable_compile_cache=False)

    def lay_out(self, graph: bytes | None, dependencies: bytes | None) -> None:
        """Make the folder hold these, and nothing else."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._laid_out = {}
        for place in self._places:
            place.mkdir(parents=True, exist_ok=True)
            for path, content in (
                (place / f"{self._role}{_GRAPH}{self._next}{_SUFFIX}", graph),
                (place / f"{self._role}{_DEPENDENCIES}", dependencies),
            ):
                if content is not None:
                    path.write_bytes(content)
                    self._laid_out[path] = _stamp(path)

    def take_in(self) -> _Written:
        """What MindSpore wrote there; nothing stays. The number of the next graph follows from the names."""
        written = [path for path in self._folder.rglob("*") if path.is_file()]
        written = [path for path in written if self._laid_out.get(path) != _stamp(path)]
        graphs = [path for path in written if path.name.startswith(f"{self._role}{_GRAPH}")]
        number = graphs[0].stem.removeprefix(f"{self._role}{_GRAPH}") if graphs else ""
        self._next = (int(number) if number.isdecimal() else self._next) + 1
        dependencies = [path for path in written if path.name == f"{self._role}{_DEPENDENCIES}"]
        content = _Written(*(_content(found[0]) if found else None for found in (graphs, dependencies)))
        shutil.rmtree(self._folder, ignore_errors=True)
        return content


def _compile(cell: nn.Cell, arguments: tuple[ms.Tensor, ...]) -> None:
    # MindSpore collects garbage before each graph; imported objects need not be scanned each time.
    gc.freeze()
    try:
        cell.compile(*arguments)
    finally:
        gc.unfreeze()


def _file_of(name: str, salt: bytes, graph: bytes) -> str:
    """The file in which a graph is kept."""
    return f"{name}.{hashlib.sha256(salt + graph).hexdigest()}{_SUFFIX}"


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _content(path: Path) -> bytes | None:
    try:
        return read_input(path, _MOST)
    except OSError:
        return None


def _key(settings: EngineSettings, world_size: int) -> str:
    """Digest of everything that graphs are made from."""
    numbers = replace(
        settings, policy_folder=None, reference_folder=None, base_folder=None, compile_cache_folder=None
    )
    found = hashlib.sha256(repr((numbers, world_size, ms.__version__)).encode())
    package = Path(__file__).parents[2]
    for room in _SOURCES:
        for source in sorted((package / room).glob("*.py")):
            found.update(source.read_bytes())
    return found.hexdigest()[:16]
