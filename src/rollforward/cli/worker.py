"""The script that `msrun` starts for `rollforward train --workers N`, as scheduler and as workers.

`msrun` starts a path, not a module, and Python puts the script's folder first on its search path,
where our `inspect.py` would shadow Python's own.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [folder for folder in sys.path if str(Path(folder).resolve()) != here]

    from rollforward.cli.main import run_process

    run_process()
