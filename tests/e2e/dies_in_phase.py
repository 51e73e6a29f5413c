"""`rollforward train` that kills itself where it enters a phase: PHASE POSITION NUMBER and its arguments.

NUMBER: how often this start enters that phase of that position, the one it dies at included.
"""

import os
import signal
import sys

from rollforward.cli.main import run_process
from rollforward.position import Position
from rollforward.processes.heartbeat import Heartbeat


def arm(phase: str, position: str, number: int) -> None:
    """SIGKILL to this process once the heartbeat tells of the phase."""
    tell, left = Heartbeat.phase, number

    def told(self: Heartbeat, at: Position, name: str) -> None:
        nonlocal left
        tell(self, at, name)
        left -= (name, str(at)) == (phase, position)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Heartbeat.phase = told  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    run_process(["train", *sys.argv[4:]])
