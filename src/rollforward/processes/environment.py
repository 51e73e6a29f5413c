"""Which process this is, and the environment that MindSpore wants before it is imported.

`msrun` starts one script several times: once as the scheduler, which brings the workers
together, and once for each worker. Environment variables say which is which.
"""

import os
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LAUNCHED = "ROLLFORWARD_WORKER_FILES"
"""Set for workers that `run.launch` started: the folder where they say that they live, and how they ended."""


_FOR_EVER = 10**9
"""Seconds."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process among those of a run."""

    role: Literal["alone", "worker", "scheduler"]
    rank: int
    world_size: int


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """What `msrun`'s variables say of this process; alone when it was not started by `msrun`."""
    workers = int(environment.get("MS_WORKER_NUM", "1"))
    role = environment.get("MS_ROLE")
    if role == "MS_SCHED":
        return Process(role="scheduler", rank=-1, world_size=workers)
    if role == "MS_WORKER" and workers > 1:
        return Process(role="worker", rank=int(environment.get("RANK_ID", "0")), world_size=workers)
    return Process(role="alone", rank=0, world_size=1)


def age() -> float:
    """Seconds since this process was started, imports included. Of computing only where there is no /proc."""
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return time.process_time()
    # Field 22 of proc(5), clock ticks since the machine was started; the first one here is field 3.
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def started_by_msrun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the user's own `msrun` started this process, be it one worker or one of several."""
    return "MS_ROLE" in environment and LAUNCHED not in environment


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what MindSpore reads when it is imported."""
    # MindSpore logs warnings of its own to standard error, many at each start.
    environment.setdefault("GLOG_v", "3")
    # Its compile cache hands out wrong graphs unless the engine says when it is on.
    environment.pop("MS_COMPILER_CACHE_ENABLE", None)


def wait_for_others(seconds: float, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the framework wait longer in a collective than we do ourselves; 0: for ever.

    MindSpore's own limit on the CPU is 30 s, after which it names nobody. One worker may well
    generate for longer than another by that.
    """
    environment.setdefault("MS_CPU_COMM_OP_TIMEOUT", str(round(2 * seconds) + 60 if seconds else _FOR_EVER))
