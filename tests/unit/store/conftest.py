"""The simulated disk and the ranks in lock step are shared with the conformance suite."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance"))
