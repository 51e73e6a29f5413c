"""How much memory there is for a run's processes here: the machine's own, and a container's limit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rollforward.inputs import read_input

_MOST_BYTES = 1 << 16
_UNLIMITED = 1 << 60
"""What version 1 of cgroups says for no limit is beyond this."""


@dataclass(frozen=True)
class Room:
    """Bytes of memory."""

    limit: int
    """That processes here can have at all."""
    free: int
    """That can be had now, without any process giving up some."""
    why: str
    """What sets the limit, for people."""


def room(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Room | None:
    """What there is; None where this cannot be found out (it is a Linux matter)."""
    told = _fields(proc / "meminfo")
    if "MemTotal" not in told:
        return None
    limit, why = told["MemTotal"], "the machine's memory"
    for file, found in _limits(proc, cgroups):
        if found < limit:
            limit, why = found, f"the limit of {file}"
    return Room(limit=limit, free=min(limit, told.get("MemAvailable", limit)), why=why)


def _fields(meminfo: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in _text(meminfo).splitlines():
        name, _, value = line.partition(":")
        number = value.removesuffix("kB").strip()
        if number.isdecimal():
            found[name] = int(number) * 1024
    return found


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[Path, int]]:
    """Of the control groups that this process is in, inside out."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            file = root.joinpath(*parts[:depth]) / name
            text = _text(file).strip()
            if text.isdecimal() and int(text) < _UNLIMITED:
                yield file, int(text)


def _text(path: Path) -> str:
    try:
        return read_input(path, _MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
