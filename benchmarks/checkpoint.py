"""Checkpoints side by side: python benchmarks/checkpoint.py [--size 512MB] [--ranks N]

The same state, the same disk, one process, the ways in turn, `--rounds` times. The best round of
each is shown: what other processes do to a machine only ever adds.

    blocked   seconds for which a training loop has to wait
    durable   seconds until every byte is on stable storage: where a way does not sync its files,
              they are synced after it, and both numbers are shown
    read      seconds to have the state back in memory, from the page cache and from the disk
    extra     peak memory taken beside the state, in MB (resident set, sampled)

The physical limits stand first: a memory copy, a plain write with fsync, a plain read. Ours
verifies a digest of every byte on the way in and makes one on the way out; others do not, except
where it says CRC. `--ranks N` adds ours with N processes. Left out: object stores.
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from checkpoint_peers import Way, mindspore_ways, torch_ways
from checkpoint_ranks import measure_ranks
from page_cache import forget, sync

from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, Retention, ShadowCheckpoints, load_manifest, restore_into
from rollforward.store.saved import About

TENSOR_BYTES = 8 << 20
CHUNK = 4 << 20
SHADOW_SECONDS_PER_GB = 6.0
"""How long the simulated generation takes, between `begin` and `before_update`."""


@dataclass
class Result:
    """What was measured of one way, a number a round."""

    name: str
    blocked: list[float] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)
    """Until its own background ended, before anything else was synced."""
    durable: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    extra: list[float] = field(default_factory=list)
    remark: str = ""
    failed: bool = False


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Samples the resident set while a block runs."""

    def __enter__(self) -> "PeakMemory":
        self.base = self.peak = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def extra(self) -> float:
        """MB above the beginning."""
        return (self.peak - self.base) / 1e6


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def make_state(size: int) -> dict[str, np.ndarray]:
    """Random float32 tensors of 8 MB, as of a model and its optimizer."""
    random = np.random.default_rng(0)
    count = max(1, size // TENSOR_BYTES)
    return {
        f"layer.{i}.weight": random.random(TENSOR_BYTES // 4, np.float32).reshape(-1, 1024)
        for i in range(count)
    }


def measure_copy(state: dict[str, np.ndarray], result: Result) -> None:
    """One memory copy into memory that is mapped already."""
    if not hasattr(measure_copy, "target"):
        measure_copy.target = {name: array.copy() for name, array in state.items()}  # type: ignore[attr-defined]
    target = measure_copy.target  # type: ignore[attr-defined]
    result.blocked.append(timed(lambda: [np.copyto(target[name], array) for name, array in state.items()]))


def measure_plain(state: dict[str, np.ndarray], folder: Path, result: Result) -> None:
    """write(2) of all bytes and one fsync; read(2) into memory that is mapped already."""
    path = folder / "plain"
    path.unlink(missing_ok=True)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for array in state.values():
                left = array.reshape(-1).view(np.uint8).data
                while left.nbytes:
                    left = left[file.write(left[:CHUNK]) :]
            os.fsync(file.fileno())

    seconds = timed(write)
    result.blocked.append(seconds)
    result.returned.append(seconds)
    result.durable.append(seconds)
    target = {name: np.zeros_like(array) for name, array in state.items()}

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            for array in target.values():
                left = array.reshape(-1).view(np.uint8).data
                while left.nbytes:
                    left = left[file.readinto(left[:CHUNK]) :]

    measure_reads(read, [path], result)


def measure_reads(read: Callable[[], object], files: list[Path], result: Result) -> None:
    """From the page cache, then from the disk."""
    read()
    result.warm.append(timed(read))
    sync(files)
    if forget(files):
        result.cold.append(timed(read))
    else:
        result.remark = "files stay mapped after load: no cold read"


def measure_ours(
    state: dict[str, np.ndarray], folder: Path, result: Result, shadow: bool, number: int
) -> None:
    """A whole checkpoint: tensor files, manifest, meta.json, every folder synced."""
    root = folder / ("shadow" if shadow else "ours")
    shutil.rmtree(root, ignore_errors=True)
    tensors = {"policy_model": state}
    store = CheckpointStore(root, retention=Retention(newest=1))
    about = {"run_id": "bench", "incarnation": 1, "state": {}}
    # The first save makes folders; a run does that once.
    small = {"policy_model": {"w": np.zeros(4, np.float32)}}
    store.save(Position(0, 0), small, global_step=0, **about)
    with PeakMemory() as memory:
        if shadow:
            save_in_shadow(store, tensors, about, result, number)
        else:
            saved = store.save(Position(0, 1), tensors, global_step=number, **about)
            result.blocked.append(saved.blocked)
            result.returned.append(saved.seconds)
            result.durable.append(saved.seconds)
    result.extra.append(memory.extra)
    storage = LocalStorage(root)
    target = {"policy_model": {name: np.zeros_like(array) for name, array in state.items()}}
    files = [path for path in root.rglob("*") if path.is_file()]
    measure_reads(
        lambda: restore_into(storage, load_manifest(storage, Position(0, 1)), target), files, result
    )
    assert all(np.array_equal(target["policy_model"][name], array) for name, array in state.items())


def save_in_shadow(store, tensors, about, result, number) -> None:  # type: ignore[no-untyped-def]
    """As the trainer does it: begin, generate, before_update, boundary, and the next step's boundary."""
    told = []
    checkpoints = ShadowCheckpoints(
        store, lambda: tensors, About(**about), saved=told.append, failed=print, warned=print
    )
    checkpoints.begin(Position(0, 1), number)
    size = sum(array.nbytes for array in tensors["policy_model"].values())
    generation = SHADOW_SECONDS_PER_GB * size / 1e9
    while not told:
        time.sleep(generation)
        checkpoints.before_update()
        checkpoints.boundary()
    checkpoints.close()
    assert checkpoints.copied_bytes == 0, "the disk was slower than the simulated generation"
    result.blocked.append(told[0].blocked)


def try_way(way: Way, result: Result) -> None:
    """`measure_way`, unless it failed before; a peer that fails is shown with its error."""
    if result.failed:
        return
    try:
        measure_way(way, result)
    except Exception as error:
        result.failed = True
        result.remark = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}"


def measure_way(way: Way, result: Result) -> None:
    """A peer: its save, its background, the syncs it does not do, its load."""
    with PeakMemory() as memory:
        began = time.perf_counter()
        way.save()
        result.blocked.append(time.perf_counter() - began)
        way.settle()
        result.returned.append(time.perf_counter() - began)
        sync(way.files())
        result.durable.append(time.perf_counter() - began)
    result.extra.append(memory.extra)
    measure_reads(way.load, way.files(), result)


def table(results: list[Result], size: int) -> str:
    """Best rounds, with ratios to the physical limits."""
    by_name = {result.name: result for result in results}
    copy = min(by_name["memory copy"].blocked)
    plain = by_name["plain write, fsync, read"]
    limits = {key: min(getattr(plain, key)) for key in ("durable", "warm", "cold")}
    lines = [
        f"{'':36}{'blocked':>16}{'returned':>10}{'durable':>16}"
        f"{'read, warm':>16}{'read, cold':>16}{'extra':>8}"
    ]
    for result in results:
        cells = [cell(result.blocked, copy, 16), cell(result.returned, None, 10)]
        cells += [cell(getattr(result, key), limits[key], 16) for key in ("durable", "warm", "cold")]
        extra = f"{min(result.extra):8.0f}" if result.extra else " " * 8
        lines.append(f"{result.name:36}{''.join(cells)}{extra}  {result.remark}")
    lines.append(
        f"state: {size / 1e6:.0f} MB in tensors of {TENSOR_BYTES / 1e6:.0f} MB; seconds, and in brackets the"
    )
    lines.append(
        "ratio to the limit: blocked to one memory copy, the others to plain write, fsync and read of the"
    )
    lines.append("same bytes (less is better, 1.00 is the limit); extra in MB")
    return "\n".join(lines)


def cell(values: list[float], limit: float | None, width: int) -> str:
    """The best round and its ratio."""
    if not values:
        return " " * width
    best = min(values)
    ratio = "" if limit is None else f" ({best / limit:5.2f})"
    return f"{best:.3f}{ratio}".rjust(width)


def picture(results: list[Result], size: int, path: Path) -> None:
    """Bars of the four times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 5), sharey=True)
    shown = [result for result in results if result.name != "memory copy"]
    for axis, key in zip(axes, ("blocked", "durable", "warm", "cold"), strict=True):
        values = [min(getattr(result, key) or [0.0]) for result in shown]
        colours = ["tab:orange" if result.name.startswith("ours") else "tab:gray" for result in shown]
        axis.barh([result.name for result in shown], values, color=colours)
        axis.set_title(f"{key}, seconds for {size / 1e6:.0f} MB")
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_size(text: str) -> int:
    """512MB and the like."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    return int(text)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=parse_size, default=512_000_000)
    parser.add_argument(
        "--ranks", type=int, default=1, help="with more than one, ours in so many processes too"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; a temporary folder by default"
    )
    parser.add_argument("--without_peers", action="store_true", help="only ours and the limits")
    parser.add_argument("--picture", type=Path, default=None, help="PNG to draw")
    options = parser.parse_args()
    state = make_state(options.size)
    size = sum(array.nbytes for array in state.values())
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-bench-") as name:
        folder = Path(name)
        ways = [] if options.without_peers else [*mindspore_ways(state, folder), *torch_ways(state, folder)]
        copy, plain = Result("memory copy"), Result("plain write, fsync, read")
        ours = Result("ours, blocking", remark="verified")
        shadow = Result("ours, in the shadow of generation", remark="verified")
        peers = [Result(way.name, remark=way.remark) for way in ways]
        for number in range(options.rounds):
            measure_copy(state, copy)
            measure_plain(state, folder, plain)
            measure_ours(state, folder, ours, False, number + 1)
            measure_ours(state, folder, shadow, True, number + 1)
            for way, result in zip(ways, peers, strict=True):
                try_way(way, result)
            print(f"round {number + 1} of {options.rounds}", flush=True)
        several = Result(f"ours, blocking, {options.ranks} ranks", remark="verified")
        if options.ranks > 1:
            for timing in measure_ranks(make_state, options.size, folder, options.ranks, options.rounds):
                several.blocked.append(timing.blocked)
                several.durable.append(timing.durable)
                several.warm.append(timing.warm)
                several.cold.append(timing.cold)
    results = [copy, plain, ours, shadow, *([several] if several.blocked else []), *peers]
    print(table(results, size))
    if options.picture is not None:
        picture(results, size, options.picture)
        print(f"drawn: {options.picture}")


if __name__ == "__main__":
    main()
