"""What object storage costs against the plain client: .venv-objects/bin/python benchmarks/object_storage.py

SeaweedFS is started on loopback ports. Each round does the same work both ways, in turns, with files of a
checkpoint's kind: one large one, and many small ones.

    upload     `ObjectStorage.write`, digested on the way | the client's own `put` of the same bytes
    download   `ObjectStorage.open` and `read_into`, several ranges at once, digested | the client's `get`
    copy       `rollforward copy` of a whole run there, read back and verified | `put` and `get` of its bytes
    restore    the newest checkpoint, read into arrays that are there, and verified, as a start does it |
               the client's `get` of its bytes

Then a loop of `open_run`, in a folder and there: how long a step waits for its record of 64 KiB, and for a
save of 64 MiB, where what generates is a pause.

Ratios are plain time / our time, best of the rounds: 1 is as fast as the client. Asked for: 0.9. What is read
comes from the server's page cache, so the network and the disk of a real service are not in it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import xxhash
from numpy.typing import NDArray
from obstore.store import S3Store

sys.path[:0] = [str(Path(__file__).parent.parent / "tests" / "objects")]
from servers import BUCKET, SECRET, USER, SeaweedFS  # noqa: E402 - beside the tests that start it too

from rollforward import open_run  # noqa: E402
from rollforward.position import Position  # noqa: E402
from rollforward.storage import LocalStorage, Storage  # noqa: E402
from rollforward.storage.address import open_storage  # noqa: E402
from rollforward.store import CheckpointStore, find, restore_into  # noqa: E402
from rollforward.store.copying import copy_run  # noqa: E402

TARGET = 0.9
PIECE = 8 << 20
TENSOR = 16 << 20
"""Bytes of a tensor of the run."""
STATE = 64 << 20
"""Bytes that the loop saves each step. The server has room for 8 GiB, and keeps what was overwritten, too."""
STEPS = 9
GENERATES = 3.0
"""Seconds of a step, while the save of the step before is written."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=256, help="of the large file, and of the run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the server keeps its files (default: the system's)")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    if busy > 0.5:
        print(f"warning: the load of this machine is {busy:.1f}; what else runs on it is measured too")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="objects-bench-") as name:
        server = SeaweedFS(Path(name) / "server")
        server.start()
        try:
            measure(server.url, Path(name), options.megabytes << 20, options.rounds)
        finally:
            server.stop()


def measure(url: str, folder: Path, size: int, rounds: int) -> None:
    """Print a line for each kind of work."""
    os.environ |= {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": url}
    plain = S3Store(BUCKET, prefix="plain", client_options={"allow_http": True})
    ours = open_storage(f"s3://{BUCKET}/ours")
    large = os.urandom(size)
    small = {f"part-{number}": large[number << 16 : (number + 1) << 16] for number in range(64)}
    run = make_run(folder / "run", large)
    read = bytearray(size)
    weights = {name: np.frombuffer(read, np.uint8, TENSOR, begin) for name, begin in tensors_of(size)}

    def read_ours(path: str, into: memoryview) -> None:
        with ours.open(path) as handle:
            handle.read_into(into, 0)
        xxhash.xxh3_128(into)

    def write_ours(path: str, content: bytes) -> None:
        seen = xxhash.xxh3_128()

        def pieces():
            for at in range(0, len(content), PIECE):
                seen.update(piece := memoryview(content)[at : at + PIECE])
                yield piece

        ours.write(path, pieces())

    turns = iter(range(10**6))
    work: Mapping[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "upload, one file": (
            lambda: write_ours("large", large),
            lambda: obstore.put(plain, "large", large),
            size,
        ),
        "download, one file": (
            lambda: read_ours("large", memoryview(read)),
            lambda: bytes(obstore.get(plain, "large").bytes()),
            size,
        ),
        "upload, 64 of 64 KiB": (
            lambda: [write_ours(name, content) for name, content in small.items()],
            lambda: [obstore.put(plain, name, content) for name, content in small.items()],
            64 << 16,
        ),
        "download, 64 of 64 KiB": (
            lambda: [read_ours(name, memoryview(bytearray(1 << 16))) for name in small],
            lambda: [bytes(obstore.get(plain, name).bytes()) for name in small],
            64 << 16,
        ),
        "restore, a run": (
            lambda: restore(open_storage(f"s3://{BUCKET}/restored"), weights),
            lambda: get_tensors(plain, run),
            size,
        ),
        "copy, a run": (
            lambda: copy_run(LocalStorage(run), open_storage(f"s3://{BUCKET}/copy-{next(turns)}")),
            lambda: there_and_back(plain, run),
            size,
        ),
    }
    copy_run(LocalStorage(run), open_storage(f"s3://{BUCKET}/restored"))
    there_and_back(plain, run)
    print(f"{'':24}{'ours':>12}{'plain':>12}{'ratio':>8}   asked for {TARGET}")
    for name, (we, they, count) in work.items():
        best = [float("inf"), float("inf")]
        for _ in range(rounds):
            for who, do in ((1, they), (0, we)):
                began = time.perf_counter()
                do()
                best[who] = min(best[who], time.perf_counter() - began)
        rates = [f"{count / seconds / 1e6:.0f} MB/s" for seconds in best]
        print(f"{name:24}{rates[0]:>12}{rates[1]:>12}{best[1] / best[0]:8.2f}", flush=True)
    print(f"\n{'median of a step, ms':24}{'record':>12}{'save':>12}")
    for name, where, durable in (
        ("in a folder", folder / "loop", "local"),
        ("there, local", f"s3://{BUCKET}/loop-local", "local"),
        ("there, remote", f"s3://{BUCKET}/loop-remote", "remote"),
    ):
        record, save = steps(where, folder / name, large[:STATE], durable)
        print(f"{name:24}{1000 * record:12.1f}{1000 * save:12.1f}", flush=True)


def steps(where: Path | str, work: Path, content: bytes, durability: Any) -> tuple[float, float]:
    """How long a step waits for its record, and for a save, in seconds: the medians of a loop's."""
    weights = np.frombuffer(bytearray(content), np.uint8)
    record = np.frombuffer(content[: 64 << 10], np.uint8)
    records, saves = [], []
    with open_run(where, keep=2, work_dir=work, journal_durability=durability, log=lambda _: None) as run:
        run.restore({"policy": {"w": weights}})
        for step in range(STEPS):
            began = time.perf_counter()
            run.once(step, "batch", lambda: record)
            records.append(time.perf_counter() - began)
            time.sleep(GENERATES)
            began = time.perf_counter()
            with run.updating(step):
                weights[step] ^= 1
                waited = time.perf_counter() - began
            run.outcome(step, sum=step)
            began = time.perf_counter()
            run.checkpoint(step + 1, {"policy": {"w": weights}})
            saves.append(waited + time.perf_counter() - began)
    return statistics.median(records), statistics.median(saves)


def restore(storage: Storage, weights: Mapping[str, NDArray[Any]]) -> None:
    """Find the newest checkpoint, and read it into the arrays."""
    restore_into(storage, find(storage).manifest, {"policy_model": weights})


def get_tensors(store: S3Store, run: Path) -> None:
    """The files with the tensors, as `there_and_back` has put them."""
    for path in run.rglob("*.safetensors"):
        bytes(obstore.get(store, str(path.relative_to(run))).bytes())


def tensors_of(size: int) -> list[tuple[str, int]]:
    """The name of each tensor of so many bytes, and where it begins."""
    return [(f"layers.{number}", number * TENSOR) for number in range(size // TENSOR)]


def make_run(folder: Path, content: bytes) -> Path:
    """A run with one checkpoint of these bytes."""
    tensors = {
        name: np.frombuffer(content, np.uint8, TENSOR, begin) for name, begin in tensors_of(len(content))
    }
    CheckpointStore(folder).save(
        Position(0, 1), {"policy_model": tensors}, global_step=1, run_id="bench", incarnation=1, state={}
    )
    return folder


def there_and_back(store: S3Store, run: Path) -> None:
    """Every file of the run, put and got."""
    for path in run.rglob("*"):
        if path.is_file():
            key = str(path.relative_to(run))
            obstore.put(store, key, path)
            bytes(obstore.get(store, key).bytes())


if __name__ == "__main__":
    main()
