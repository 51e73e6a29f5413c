"""A process to be killed: runs the toy run to its end, and says so. Arguments: folder, epochs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))

from toy_run import Work, run_rank

from rollforward.position import Position
from rollforward.storage import LocalStorage

if __name__ == "__main__":
    sys.stdout.write("started\n")
    sys.stdout.flush()
    run_rank(
        LocalStorage(sys.argv[1]), 0, 1, lambda value: [value], Work(), end=Position(int(sys.argv[2]), 0)
    )
    sys.stdout.write("ended\n")
