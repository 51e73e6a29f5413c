"""Crash recovery for a training loop of your own: `open_run`.

    import rollforward

    tensors = {"policy": {"w": w}, "optimizer": {"m": m, "v": v}}    # NumPy arrays: role -> name -> array

    with rollforward.open_run("output/run", facts={"lr": lr, "seed": seed}) as run:
        start = run.restore(tensors)                       # newest intact checkpoint, into the arrays
        for step in range(start.step if start else 0, steps):
            batch = run.once(step, "rollouts", lambda: sample(w, step))    # durable before it is used
            with run.updating(step):                       # weights change only in here
                loss = update(tensors, batch)
            run.outcome(step, loss=loss)                   # a replay has to repeat it to the last bit
            run.checkpoint(step + 1, tensors, every=10)    # written while the next step samples
        run.checkpoint(steps, tensors)                     # the last one

Kill it anywhere and start it again: it continues from the newest checkpoint that proves intact. Steps that
were finished after that are replayed: `once` returns what was recorded, so nothing is sampled again; the
update runs; its outcome is compared with the recorded one, bit by bit. The run ends with the same bytes as
one that was never interrupted.

Outside `once` the loop has to be deterministic: a function of the tensors, the step, what `once` returned and
`facts`. Key random numbers by the step, or draw them inside `once`. Steps are numbers, or pairs (epoch,
step), and only go up.

Several processes run the same loop on the same tensors (data-parallel training); calls that are collective
say so. A tensor that is split over the processes is a `rollforward.Piece` on each: `{"m": Piece(array,
global_shape, offset)}`, the box of it that this process holds. Left out: resuming with another number of
processes.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rollforward.agreement import AllGather, together
from rollforward.channel import AllSum
from rollforward.replay.arguments import as_json, check_alike, misuse
from rollforward.replay.comparing import OnDivergence
from rollforward.replay.loop import LoopSettings, Place, Ranks
from rollforward.replay.rebuilding import asked_of
from rollforward.replay.running import Run as Run
from rollforward.replay.running import Start as Start
from rollforward.storage.address import is_remote, local_path
from rollforward.store import Retention
from rollforward.store.cleaning import remove_strays
from rollforward.store.place import Hold, RunPlace, begin_together
from rollforward.tensors import Piece as Piece


def open_run(
    path: str | Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    all_gather: AllGather | None = None,
    all_sum: AllSum | None = None,
    facts: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    keep: int | Retention = 5,
    prove_unchanged: bool = False,
    on_divergence: OnDivergence = "stop",
    attachments: Mapping[str, bytes] | None = None,
    work_dir: str | Path = "",
    journal_durability: Literal["local", "remote"] = "local",
    storage_options: Mapping[str, str] | None = None,
    log: Callable[[str], None] | None = None,
) -> Run:
    """Open a run's folder, new or not, and lock it until the run is closed. Collective.

    `path`: the folder, or an address in object storage: `s3://bucket/path/of/the/run`.
    `rank`, `world_size`, `all_gather`: this process among those that train together. `all_gather(value)`
    returns each process's value (anything JSON can hold), in the order of ranks, on all of them.
    `all_sum`: an AllReduce, if there is one: `all_sum(numbers)` returns the sum of each number over the
    processes, on all of them; float32 can hold them. With it, what a process exchanges for a checkpoint does
    not grow with the number of processes.
    `facts`: what influences the numbers, as JSON: hyperparameters, seed, a digest of the data. A resume
    names the facts that changed, and does not replay what was recorded with others.
    `versions`: of the libraries that compute, besides NumPy. Where they changed, a replay is compared
    within a tolerance.
    `keep`: how many checkpoints to keep, or a `rollforward.store.Retention`.
    `prove_unchanged`: digest all tensors after each update and before the next, to find what changes them
    outside `updating`. Each is one pass over memory.
    `on_divergence`: what to do when a replay differs from the record: "stop", or "accept" the new values.
    `attachments`: small files that go with every checkpoint, such as `config.json`: name -> content. They are
    stored once, in `model/`, with a second copy.
    `work_dir`: for a run in object storage, the folder for what is only of this machine; by default one in
    `~/.cache/rollforward`, which the log names. Losing it costs at most what was not shipped yet.
    `journal_durability`: there, "remote" returns from `once` only when the service has the result, so that
    nothing is lost with the machine; "local" when this machine's disk has it, and ships it behind.
    `storage_options`: there, besides the AWS_* variables, for example {"endpoint": "http://..."}; never
    written anywhere.
    `log`: called with each line of the log; by default lines go to `logging.getLogger("rollforward")`.

    Raises RunLocked when another process holds the folder, InputError for arguments that make no sense, and
    StorageError.
    """
    if all_gather is None:
        if world_size != 1:
            misuse("a run of several processes needs all_gather, by which they agree")
        all_gather = _alone
    if not 0 <= rank < world_size:
        misuse(f"rank {rank} of {world_size} processes")
    if on_divergence not in ("stop", "accept"):
        misuse(f"on_divergence is {on_divergence!r}; it is 'stop' or 'accept'")
    settings = LoopSettings(
        ranks=Ranks(rank, world_size, all_gather, all_sum),
        facts=as_json("facts", facts or {}),
        versions={"numpy": np.__version__, **{name: str(text) for name, text in (versions or {}).items()}},
        retention=keep if isinstance(keep, Retention) else Retention(newest=keep),
        prove_unchanged=prove_unchanged,
        on_divergence=on_divergence,
        attachments=dict(attachments or {}),
        log=log or _to_logger,
    )
    if journal_durability not in ("local", "remote"):
        misuse(f"journal_durability is {journal_durability!r}; it is 'local' or 'remote'")
    opened = time.perf_counter()
    address = path if is_remote(path) else local_path(path).expanduser()
    if rebuild := asked_of(address):
        address, settings = rebuild.out, replace(settings, until=rebuild.until)
    with contextlib.ExitStack() as stack:
        place = _take(
            lambda: RunPlace.at(address, work_dir=work_dir, options=storage_options),
            settings,
            stack,
            durable_there=journal_durability == "remote",
            opened=opened,
        )
        return Run(place, settings, release=stack.pop_all().close)


def _take(
    find: Callable[[], RunPlace],
    settings: LoopSettings,
    stack: contextlib.ExitStack,
    *,
    durable_there: bool,
    opened: float,
) -> Place:
    """Lock the run and begin to work in it, until the stack is closed. Collective."""
    ranks = settings.ranks

    def acquire() -> tuple[RunPlace, Hold | None]:
        where = find()
        if ranks.rank != 0:
            return where, None
        hold = where.hold(say=settings.say)
        stack.callback(hold.release)
        if hold.taken_over is not None:
            settings.say(f"lock: taken over, its owner ended without releasing it: {hold.taken_over}")
        if where.remote:
            settings.say(f"working folder: {where.folder}")
        remove_strays(where.storage)
        return where, hold

    def tell(found: tuple[RunPlace, Hold | None]) -> list[Any]:
        hold = found[1]
        return [ranks.rank, ranks.world_size, settings.facts, hold.incarnation if hold else 0]

    (where, hold), answers = together(acquire, ranks.all_gather, tell=tell)
    check_alike(answers, ranks.world_size)
    incarnation = answers[0][-1]
    storage = begin_together(
        where,
        hold,
        rank=ranks.rank,
        world_size=ranks.world_size,
        incarnation=incarnation,
        all_gather=ranks.all_gather,
        closing=stack,
        durable_there=durable_there,
        say=settings.log,
        warn=settings.warn,
    )
    return Place(
        storage=storage,
        incarnation=incarnation,
        fence=hold.check if hold else _nothing,
        opened=opened,
        remote=where.remote,
        left_behind=hold.left_behind if hold else {},
    )


def _alone(value: Any) -> list[Any]:
    return [value]


def _nothing() -> None:
    """Only the first rank publishes, so only it is fenced."""


def _to_logger(line: str) -> None:
    level = logging.WARNING if line.startswith("warning: ") else logging.INFO
    logging.getLogger("rollforward").log(level, line)
