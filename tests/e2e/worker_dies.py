"""`rollforward train --workers N`, of which one kills itself: RANK PHASE POSITION NUMBER and its arguments.

The last three are those of `dies_in_phase`. `msrun` starts this file again, for each worker.
"""

import os
import sys
from pathlib import Path

from dies_in_phase import arm

from rollforward.cli import computing
from rollforward.cli.main import run_process

WHERE = "ROLLFORWARD_TEST_WORKER_DIES"

if __name__ == "__main__":
    if WHERE in os.environ:
        rank, phase, position, number = os.environ[WHERE].split()
        if os.environ.get("MS_ROLE") == "MS_WORKER" and os.environ["RANK_ID"] == rank:
            arm(phase, position, int(number))
        run_process()
    else:
        os.environ[WHERE] = " ".join(sys.argv[1:5])
        computing.WORKER = Path(__file__)
        run_process(["train", *sys.argv[5:]])
