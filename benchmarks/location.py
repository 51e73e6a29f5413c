"""Finding the newest checkpoint among many: python benchmarks/location.py [--ranks 1024] [--tensors 1000]

Makes a run's folder with synthetic manifests, as many checkpoints as asked for, each of so many
ranks and tensors a role. The tensor files of the newest two are there with their sizes (sparse);
those of the others are not, since nobody looks at them. Then measures what a resuming run does:
order all manifests, read the newest, see that every file is there with its size.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import find
from rollforward.store import manifest as manifests
from rollforward.store.digests import digest
from rollforward.store.layout import ROLE_FOLDERS, TensorFileName
from rollforward.store.manifest import FileRecord, Manifest, StoredTensor
from rollforward.store.parts import assign
from rollforward.store.tensorfile import TensorRecord

ROWS = 1000
HEADER = 4096


def synthetic(position: Position, ranks: int, tensors: int) -> Manifest:
    """A manifest of a checkpoint that nobody saved."""
    sizes = {role: {f"model.layers.{i}.weight": 4 * ROWS for i in range(tensors)} for role in ROLE_FOLDERS}
    files: list[FileRecord] = []
    stored: list[StoredTensor] = []
    for role, shares in assign(sizes, ranks).items():
        for rank, names in enumerate(shares):
            path = TensorFileName(role, rank, position).path
            for number, name in enumerate(names):
                begin = HEADER + number * 4 * ROWS
                record = TensorRecord(
                    name, "F32", (ROWS,), begin, begin + 4 * ROWS, digest(f"{role}{name}".encode())
                )
                stored.append(StoredTensor(role, path, record))
            files.append(FileRecord(path, HEADER + len(names) * 4 * ROWS, digest(path.encode())))
    return Manifest(
        incarnation=1,
        position=position,
        run_id="synthetic",
        global_step=position.step,
        created="2026-01-31T12:00:00.000000Z",
        world_size=ranks,
        fingerprint="",
        versions={},
        state={},
        files=tuple(files),
        tensors=tuple(stored),
    )


def renumbered(content: bytes, old: Position, new: Position) -> bytes:
    """The same manifest for another position."""
    body = content[:-46].replace(f'"position":"{old}"'.encode(), f'"position":"{new}"'.encode())
    body = body.replace(f"-{old}.safetensors".encode(), f"-{new}.safetensors".encode())
    return body + f',"digest":"{digest(body)}"}}\n'.encode()


def make_files(root: Path, manifest: Manifest) -> None:
    """Sparse files of the right sizes."""
    for file in manifest.files:
        path = root / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as opened:
            opened.truncate(file.size)


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--tensors", type=int, default=1000, help="tensors a role")
    parser.add_argument("--checkpoints", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="location-bench-") as name:
        root = Path(name)
        (root / "commits").mkdir()
        first = Position(0, 0)
        content = manifests.dump(synthetic(first, options.ranks, options.tensors))
        for step in range(options.checkpoints):
            (root / "commits" / f"0_{step}.json").write_bytes(renumbered(content, first, Position(0, step)))
        for step in range(max(0, options.checkpoints - 2), options.checkpoints):
            make_files(root, synthetic(Position(0, step), options.ranks, options.tensors))
        storage = LocalStorage(root)
        print(f"{options.checkpoints} checkpoints, {options.ranks} ranks, {options.tensors} tensors a role")
        print(f"a manifest: {len(content) / 1e6:.2f} MB")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for what in ("newest", "newest, again"):
            began, busy = time.perf_counter(), time.process_time()
            found = find(storage)
            seconds, computing = time.perf_counter() - began, time.process_time() - busy
            print(f"{what}: {seconds:.3f} s, {computing:.3f} s of them computing")
        assert found.manifest.position == Position(0, options.checkpoints - 1)
        (root / found.manifest.files[-1].path).unlink()
        began = time.perf_counter()
        found = find(storage)
        print(f"one file of the newest missing, the next one taken: {time.perf_counter() - began:.3f} s")
        assert len(found.rejected) == 1
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"memory above what making them took: {(after - before) / 1024:.0f} MB at most")


if __name__ == "__main__":
    main()
