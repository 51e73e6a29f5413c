"""The program that calls math-verify, in a process of its own. Run by `mathematics`, never imported.

A line of JSON in, `[given, expected]`; a line out: `true`, `false`, or `null` when memory ran out.
SymPy evaluates what it reads, and a power such as `9^9^9` keeps the interpreter busy inside one
multiplication, where no signal handler ever runs. So the kernel sets the limits: a timer that ends
this process, and a limit on its memory.
"""

import sys
from pathlib import Path

if (
    __name__ == "__main__"
    and sys.path
    and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent
):
    # Python puts a script's folder first; ours has a `format.py`, which must not shadow another one.
    del sys.path[0]

import json
import os
import resource
import signal


def main(seconds: float, memory: int) -> None:
    """Answer each line until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then closes our input
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print is not an answer

    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    verify(
        parse("$\\frac{1}{2}$", parsing_timeout=None),
        parse("$0.5$", parsing_timeout=None),
        timeout_seconds=None,
    )
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        given, expected = json.loads(line)
        # CPU time, so that a busy machine changes no reward; and a long wall-clock time.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds * 12)
        try:
            reference, candidate = parse(expected, parsing_timeout=None), parse(given, parsing_timeout=None)
            verdict = bool(reference and candidate and verify(reference, candidate, timeout_seconds=None))
        except MemoryError:
            verdict = None
        except Exception:  # what it cannot read is not equal
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(f"{json.dumps(verdict)}\n")
        answers.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
