"""The script that `msrun` starts for `rollforward train --workers N`, as scheduler and as workers.

`msrun` starts a path, not a module, and Python puts a script's folder in front of its search
path: there our `inspect.py` would take the place of Python's own.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [folder for folder in sys.path if str(Path(folder).resolve()) != here]

    from rollforward.cli.main import run_process

    run_process()
