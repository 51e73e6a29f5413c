"""What this machine does at best, for benchmarks to compare with: JSON, by NumPy's BLAS.

operations_per_second    of float32 matrix multiplication
bytes_per_second         read from memory: a matrix larger than any cache times a vector
"""

import json
import time
from collections.abc import Callable

import numpy as np


def main() -> None:
    """Measure, print."""
    source = np.random.default_rng(0)
    size = 2048
    square = source.random((size, size), dtype=np.float32)
    large = np.ones((8192, 8192), np.float32)
    vector = np.ones(8192, np.float32)
    print(
        json.dumps(
            {
                "operations_per_second": 2 * size**3 / best(lambda: square @ square),
                "bytes_per_second": large.nbytes / best(lambda: large @ vector),
            }
        )
    )


def best(action: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of several runs: other work on the machine only ever adds."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    main()
