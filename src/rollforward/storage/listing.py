"""Looking at every file of a run in a bucket, without a request for each.

`listed` is what a check of many files looks through: a `Storage` whose `stat` and `scan` are answered from
one listing of each folder at the root, made when it is first needed. So they are as old as that. What the
listing does not show is asked for: a run may save meanwhile, and nothing that has come since is taken for
missing. What was removed since still looks as if it were there, until somebody opens it.

Contents are read as ever, and changes are made in the storage itself.
"""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from rollforward.storage.base import Appender, Buffer, Entry, ReadHandle, Storage


@runtime_checkable
class Walkable(Protocol):
    """A storage far away, where one listing is cheaper than looking at each file."""

    def walk(self, folder: str) -> dict[str, Entry]:
        """Path -> entry of every file below a folder, however deep; empty when there is no such folder."""
        ...


def listed(storage: Storage) -> Storage:
    """The storage, to look at many of its files once; itself where looking at each costs little."""
    return Listing(storage, storage) if isinstance(storage, Walkable) else storage


class Listing:
    """`Storage`, as above. To be thrown away after use."""

    def __init__(self, storage: Storage, walkable: Walkable) -> None:
        self._storage = storage
        self._walkable = walkable
        self._folders: dict[str, dict[str, dict[str, Entry]]] = {}
        """Folder at the root -> it and each folder below it -> its entries by name."""

    def __str__(self) -> str:
        return str(self._storage)

    def stat(self, path: str) -> Entry | None:
        folder, _, name = path.rpartition("/")
        below = self._below(path)
        if path in below:
            return Entry(name, "folder", 0)
        return below.get(folder, {}).get(name) or self._storage.stat(path)

    def scan(self, folder: str) -> list[Entry]:
        known = self._below(folder).get(folder) if folder else None
        if known is None:
            return self._storage.scan(folder)
        return [known[name] for name in sorted(known)]

    def _below(self, path: str) -> dict[str, dict[str, Entry]]:
        root = path.partition("/")[0]
        if root not in self._folders:
            found: dict[str, dict[str, Entry]] = {}
            self._folders[root] = found
            for file, entry in self._walkable.walk(root).items():
                folder, _, name = file.rpartition("/")
                found.setdefault(folder, {})[name] = entry
                while "/" in folder:
                    folder, _, name = folder.rpartition("/")
                    found.setdefault(folder, {})[name] = Entry(name, "folder", 0)
        return self._folders[root]

    def open(self, path: str) -> ReadHandle:
        return self._storage.open(path)

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        return self._storage.write(path, buffers)

    def appender(self, path: str) -> Appender:
        return self._storage.appender(path)

    def rewrite(self, path: str, buffers: Iterable[Buffer]) -> Appender:
        return self._storage.rewrite(path, buffers)

    def remove(self, path: str) -> None:
        self._storage.remove(path)

    def sync_file(self, path: str) -> None:
        self._storage.sync_file(path)

    def sync_folder(self, path: str) -> None:
        self._storage.sync_folder(path)
