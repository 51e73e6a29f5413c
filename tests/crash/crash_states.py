"""Every state in which a crash may leave a disk, from the log of what was done to it.

What POSIX promises is little, and this model promises no more: the content of a file survives
when it was fsynced after it was written, and a name in a folder when the folder was fsynced
after it was made. Everything else may have reached the disk or not, each independently of the
others: any subset of the unsynced writes, creations, renames (each as a whole), removals and
new folders. Of the last unsynced write any number of 512-byte sectors may have arrived, and
its bytes may be zeros (the size is metadata, and may arrive without the data).

Where more than `FULL` operations are pending their subsets are too many, and some are taken:
none, all, each alone, all but each, each beginning, each end, and `SAMPLES` drawn with a fixed
seed.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from simulated_disk import Op

SECTOR = 512
FULL = 7
SAMPLES = 40
ROOT = 1

Tree = dict[str, bytes | None]


@dataclass(frozen=True)
class Write:
    """Bytes that were written and not synced."""

    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Names:
    """A change of a folder's names that was not synced; one change is atomic."""

    folder: int
    changes: tuple[tuple[str, int | None], ...]


Pending = Write | Names


@dataclass
class DiskModel:
    """What is durable and what is pending, as the log is replayed."""

    contents: dict[int, bytes] = field(default_factory=dict)
    """inode -> durable content, for files."""
    names: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    """inode -> durable names, for folders."""
    pending: list[Pending] = field(default_factory=list)
    _visible: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    _sizes: dict[int, int] = field(default_factory=dict)

    def apply(self, op: Op) -> None:
        """One more operation was done."""
        if op.kind == "write":
            offset = self._sizes[op.inode]
            self.pending.append(Write(op.inode, offset, op.data))
            self._sizes[op.inode] = offset + len(op.data)
        elif op.kind == "fsync":
            done = [item for item in self.pending if isinstance(item, Write) and item.inode == op.inode]
            self.contents[op.inode] = _written(self.contents[op.inode], done)
            self.pending = [item for item in self.pending if item not in done]
        elif op.kind == "fsync_folder":
            folder = self._folder(op.path)
            synced = [item for item in self.pending if isinstance(item, Names) and item.folder == folder]
            for item in synced:
                _rename(self.names[folder], item)
            self.pending = [item for item in self.pending if item not in synced]
        elif op.kind != "mark":
            self._change_names(op)

    def _change_names(self, op: Op) -> None:
        above, _, name = op.path.rpartition("/")
        folder = self._folder(above)
        if op.kind == "create":
            self.contents[op.inode], self._sizes[op.inode] = b"", 0
            changes: tuple[tuple[str, int | None], ...] = ((name, op.inode),)
        elif op.kind == "mkdir":
            self.names[op.inode], self._visible[op.inode] = {}, {}
            changes = ((name, op.inode),)
        elif op.kind == "rename":
            changes = ((name, None), (op.target.rpartition("/")[2], self._visible[folder][name]))
        else:
            changes = ((name, None),)
        change = Names(folder, changes)
        _rename(self._visible[folder], change)
        self.pending.append(change)

    def _folder(self, path: str) -> int:
        inode = ROOT
        for part in [part for part in path.split("/") if part]:
            inode = self._visible[inode][part]
        return inode

    def tree(self, survived: list[Pending]) -> Tree:
        """The disk after a crash that left these of the pending operations done."""
        writes: dict[int, list[Write]] = {}
        names: dict[int, dict[str, int]] = {}
        for item in survived:
            if isinstance(item, Write):
                writes.setdefault(item.inode, []).append(item)
            else:
                _rename(names.setdefault(item.folder, dict(self.names[item.folder])), item)
        found: Tree = {}

        def walk(folder: int, prefix: str) -> None:
            for name, inode in names.get(folder, self.names[folder]).items():
                if inode in self.names:
                    found[f"{prefix}/{name}"] = None
                    walk(inode, f"{prefix}/{name}")
                else:
                    found[f"{prefix}/{name}"] = _written(self.contents[inode], writes.get(inode, []))

        walk(ROOT, "")
        return found


def crash_states(model: DiskModel, seed: int) -> Iterator[Tree]:
    """The states that a crash may leave now; see the module's docstring for which."""
    pending = model.pending
    for chosen in _subsets(len(pending), seed):
        yield model.tree([item for item, taken in zip(pending, chosen, strict=True) if taken])
    last = max((i for i, item in enumerate(pending) if isinstance(item, Write)), default=None)
    if last is not None:
        for torn in _torn(pending[last]):
            for others in (True, False):
                kept = [
                    item for item in pending if others or isinstance(item, Names) or item is pending[last]
                ]
                yield model.tree([torn if item is pending[last] else item for item in kept])


def _subsets(count: int, seed: int) -> Iterator[tuple[bool, ...]]:
    if count <= FULL:
        yield from itertools.product((False, True), repeat=count)
        return
    yield (False,) * count
    yield (True,) * count
    for i in range(count):
        yield tuple(j == i for j in range(count))
        yield tuple(j != i for j in range(count))
        yield tuple(j < i for j in range(count))
        yield tuple(j >= i for j in range(count))
    drawn = random.Random(seed)
    for _ in range(SAMPLES):
        yield tuple(drawn.random() < 0.5 for _ in range(count))


def _torn(write: Pending) -> Iterator[Write]:
    assert isinstance(write, Write)
    for end in range(SECTOR, len(write.data), SECTOR):
        yield Write(write.inode, write.offset, write.data[:end])
    yield Write(write.inode, write.offset, bytes(len(write.data)))


def _written(content: bytes, writes: list[Write]) -> bytes:
    if not writes:
        return content
    result = bytearray(content)
    for item in writes:
        if len(result) < item.offset:
            result += bytes(item.offset - len(result))
        result[item.offset : item.offset + len(item.data)] = item.data
    return bytes(result)


def _rename(names: dict[str, int], change: Names) -> None:
    for name, inode in change.changes:
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode
