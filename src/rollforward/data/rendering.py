"""Chats rendered in a process of its own, with bounds on time and memory.

A chat template comes with a model and is a program. Jinja's sandbox keeps it from files and from Python's
insides, but not from looping forever or making a text of a terabyte, by mistake or not. So the kernel limits
it: `CPU_SECONDS` of CPU time for each chat, `MEMORY_BYTES` of address space, and at most `TEXT_LIMIT`
characters of text. A child process reads the template and the chats, a line of JSON each, and answers with a
line of JSON for each chat; it ends at the first failure.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CPU_SECONDS = 10
MEMORY_BYTES = 1 << 30
TEXT_LIMIT = 1 << 24


class ChatFailed(Exception):
    """A chat that could not be rendered: its number, and why."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason


@dataclass(frozen=True)
class Rendered:
    """The result of rendering some chats."""

    texts: list[str]
    dated: bool
    """Whether the template asked for the date."""


def render_chats(
    template: str,
    variables: Mapping[str, Any],
    chats: Sequence[Sequence[Mapping[str, Any]]],
    today: datetime.date,
) -> Rendered:
    """The text of each chat; ChatFailed for the first that has none."""
    head = {
        "template": template,
        "variables": dict(variables),
        "today": today.isoformat(),
        "seconds": CPU_SECONDS,
    }
    lines = [json.dumps(item) for item in (head, *chats)]
    # What this process can import, the child can; -P: and nothing that merely lies in the working folder.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rollforward.data.rendering"],
        input="\n".join(lines).encode(),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
    )
    texts: list[str] = []
    dated = False
    for line in done.stdout.split(b"\n")[:-1]:
        answer = json.loads(line)
        if "failed" in answer:
            raise ChatFailed(len(texts), answer["failed"])
        texts.append(answer["text"])
        dated = answer["dated"]
    if len(texts) < len(chats):
        raise ChatFailed(len(texts), _why_it_ended(done.returncode, done.stderr))
    return Rendered(texts, dated)


def _why_it_ended(code: int, errors: bytes) -> str:
    if code in (-signal.SIGPROF, -signal.SIGXCPU):
        return f"it takes more than {CPU_SECONDS} s of processor time for one chat"
    said = errors.decode(errors="replace").strip().rpartition("\n")[2]
    if "MemoryError" in said:
        return _TOO_MUCH
    return f"the process that renders ended with {code}{f': {said}' if said else ''}"


_TOO_MUCH = f"it needs more than {MEMORY_BYTES >> 30} GiB of memory for one chat"


def _bound() -> None:
    """Have the kernel end this process when it uses too much."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # a lower limit is already set, or the system has none


def _restart_clock(seconds: float) -> None:
    # The signal's default action ends the process wherever it is, in the middle of C code as well.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _serve() -> None:
    """The child: lines of JSON in, lines of JSON out."""
    import jinja2

    from rollforward.data.chats import Chats

    _bound()
    given = json.loads(sys.stdin.buffer.readline())
    today = datetime.date.fromisoformat(given["today"])
    _restart_clock(given["seconds"])
    made: Chats | None = None
    for line in sys.stdin.buffer:
        try:
            if made is None:
                made = Chats(given["template"], given["variables"], today)
            text = made.render(json.loads(line))
            if len(text) > TEXT_LIMIT:
                raise ValueError(f"it makes a text of {len(text):,} characters")
            answer = {"text": text, "dated": made.dated}
        except MemoryError:
            answer = {"failed": _TOO_MUCH}
        except jinja2.TemplateError as error:
            answer = {"failed": error.message or type(error).__name__}
        except RecursionError:
            answer = {"failed": "it nests too deep"}
        except Exception as error:  # a template may raise anything
            answer = {"failed": str(error) or type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if "failed" in answer:
            return
        _restart_clock(given["seconds"])


if __name__ == "__main__":
    _serve()
