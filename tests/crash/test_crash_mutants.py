"""Planted mistakes. The crash harness is worth something only because it finds each of them."""

from dataclasses import replace

import pytest
from crash_run import ROOT, Checker, Violation, open_storage, record, states

from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, cleaning
from rollforward.store.layout import COMMITS, TABLES, manifest_path


class Without:
    """A disk on which one call does nothing where `when(path)` holds."""

    def __init__(self, disk, call, when=lambda _path: True):
        self._disk = disk
        self._call = call
        self._when = when

    def __getattr__(self, name):
        real = getattr(self._disk, name)
        if name != self._call:
            return real
        return lambda argument: None if self._when(argument) else real(argument)


class TrustsFolders(LocalStorage):
    """Takes a folder that exists for one that is durable."""

    def _make_durable_folder(self, folder):
        try:
            self._ops.lstat(folder)
        except FileNotFoundError:
            super()._make_durable_folder(folder)


class ForgetsParents(LocalStorage):
    """Makes folders and does not sync them in their parents."""

    def _make_durable_folder(self, folder):
        parts = folder.strip("/").split("/")
        for count in range(1, len(parts) + 1):
            self._make_folder("/" + "/".join(parts[:count])) if count > 1 else None


class WritesInPlace(LocalStorage):
    """Writes straight to the final name."""

    def write(self, path, buffers):
        target = self._full(path)
        self._make_durable_folder(target.rpartition("/")[0])
        if self.stat(path):
            self._ops.unlink(target)
        fd = self._ops.create(target)
        size = sum(self._ops.write(fd, memoryview(buffer).cast("B")) for buffer in buffers)
        self._ops.fsync(fd)
        self._ops.close(fd)
        self._ops.fsync_folder(target.rpartition("/")[0])
        return size


class ManifestFirst(LocalStorage):
    """Holds tensor files back until the manifest is written."""

    held: list = []  # noqa: RUF012 - shared by the ranks on purpose

    def write(self, path, buffers):
        content = b"".join(bytes(buffer) for buffer in buffers)
        if path.endswith(".safetensors"):
            self.held.append((path, content))
            return len(content)
        size = super().write(path, [content])
        if path.startswith(COMMITS):
            while self.held:
                super().write(self.held[0][0], [self.held.pop(0)[1]])
        return size


class NoSyncAfterRemoving(LocalStorage):
    """Removes a manifest and does not make that durable before its files go."""

    def sync_folder(self, path):
        pass


class DeletesAhead(CheckpointStore):
    """Takes the checkpoint before back when a save begins."""

    def plan(self, *what):
        if self.rank == 0 and self.previous is not None:
            self.storage.remove(manifest_path(self.previous.position))
            self.storage.sync_folder(COMMITS)
            self.inventory = None
        return super().plan(*what)


class ReplacesCommitted(CheckpointStore):
    """Saves a position again under the names it had before."""

    def plan(self, *what):
        return replace(super().plan(*what), number=0)


class ForgetsReferences(CheckpointStore):
    """Keeps the files of the newest position only, not those that it took over."""

    def tidy(self, committed):
        position = committed.manifest.position
        newest = frozenset(name for name in committed.kept.generations if name[1] == position)
        return super().tidy(replace(committed, kept=replace(committed.kept, generations=newest)))


class ForgetsTables(CheckpointStore):
    """Keeps the tables of the newest checkpoint only."""

    def tidy(self, committed):
        newest = committed.manifest.table_file(0).generation
        left = frozenset(item for item in committed.kept.generations if item[0] != TABLES or item == newest)
        return super().tidy(replace(committed, kept=replace(committed.kept, generations=left)))


def without_fsync_of_tables(disk):
    return LocalStorage(ROOT, Without(disk, "fsync", lambda fd: "/tables/" in disk._open[fd][1]))


def mutant_storage(kind):
    return lambda disk: kind(ROOT, disk)


def mutant_disk(call, when=lambda _path: True):
    return lambda disk: LocalStorage(ROOT, Without(disk, call, when))


MUTANTS = {
    "no fsync of files": (CheckpointStore, mutant_disk("fsync")),
    "no fsync of folders": (CheckpointStore, mutant_disk("fsync_folder")),
    "no fsync of the manifests' folder": (
        CheckpointStore,
        mutant_disk("fsync_folder", lambda path: path.endswith(COMMITS)),
    ),
    "no fsync of one rank's folder": (
        CheckpointStore,
        mutant_disk("fsync_folder", lambda path: path.endswith("critic/rank_1")),
    ),
    "no fsync of tables": (CheckpointStore, without_fsync_of_tables),
    "no fsync of one rank's folder of tables": (
        CheckpointStore,
        mutant_disk("fsync_folder", lambda path: path.endswith("tables/rank_2")),
    ),
    "tables removed that an older checkpoint needs": (ForgetsTables, open_storage),
    "new folders not synced in their parents": (CheckpointStore, mutant_storage(ForgetsParents)),
    "folders trusted because they exist": (CheckpointStore, mutant_storage(TrustsFolders)),
    "files written in place": (CheckpointStore, mutant_storage(WritesInPlace)),
    "manifest before data": (CheckpointStore, mutant_storage(ManifestFirst)),
    "files removed before the manifest's removal is durable": (
        CheckpointStore,
        mutant_storage(NoSyncAfterRemoving),
    ),
    "the checkpoint before deleted ahead of the commit": (DeletesAhead, open_storage),
    "committed files replaced by another save of their position": (ReplacesCommitted, open_storage),
    "files removed that a newer checkpoint took over": (ForgetsReferences, open_storage),
}


@pytest.mark.parametrize("mistake", MUTANTS)
def test_the_harness_finds(mistake):
    build, storage = MUTANTS[mistake]
    ManifestFirst.held.clear()
    run = record(build, storage)
    checker = Checker(run)

    def crash_everywhere():
        """Some of the states first: a mistake that shows late shows in many."""
        for some in (lambda number: number % 10 == 0, lambda number: number % 10 != 0):
            for number, (tree, reported) in enumerate(states(run)):
                if some(number):
                    checker.check(tree, reported)

    with pytest.raises(Violation):
        crash_everywhere()


def test_the_mutants_are_of_functions_that_are_used():
    """A renamed method would turn a mutant into the real thing."""
    assert {"_make_durable_folder", "_make_folder", "write", "sync_folder"} <= set(vars(LocalStorage))
    assert {"plan", "tidy"} <= set(vars(CheckpointStore))
    assert cleaning.COMMITS == COMMITS
