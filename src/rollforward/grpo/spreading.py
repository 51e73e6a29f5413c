"""Which part of the optimizer each worker keeps: a function of the tensors' shapes and the number of workers.

A tensor's moments and its update belong to one worker. A tensor that is larger than a fair share is cut by
rows, at multiples of the blocks by which checkpoints are digested, so that its digest stays the same. An
optimizer's step works element by element, so nothing of this changes a bit.
"""

import heapq
import math
from collections.abc import Mapping

from rollforward.boxes import Box, Shape, block_rows, cut_rows

_BYTES = 4
"""Of an element: optimizers keep float32."""


def spread(shapes: Mapping[str, Shape], workers: int) -> list[dict[str, Box]]:
    """What each worker keeps: tensor -> box, at most one of each tensor.

    Largest first, each to the worker with the fewest elements so far that has nothing of this tensor: no
    worker gets more than a fair share and one box.
    """
    fair = sum(map(math.prod, shapes.values())) / workers
    boxes = [
        (box, name)
        for name, shape in shapes.items()
        for box in cut_rows(shape, _parts(shape, fair, workers), grain=block_rows(shape, _BYTES))
    ]
    kept: list[dict[str, Box]] = [{} for _ in range(workers)]
    heap = [(0, worker) for worker in range(workers)]
    for box, name in sorted(boxes, key=lambda item: (-item[0].size, item[1], item[0].offset)):
        passed_over = []
        while name in kept[heap[0][1]]:
            passed_over.append(heapq.heappop(heap))
        size, worker = heapq.heappop(heap)
        kept[worker][name] = box
        for item in (*passed_over, (size + box.size, worker)):
            heapq.heappush(heap, item)
    # In the order of the tensors, which is that of the optimizer's step.
    return [{name: mine[name] for name in shapes if name in mine} for mine in kept]


def _parts(shape: Shape, fair: float, workers: int) -> int:
    return min(workers, math.ceil(math.prod(shape) / fair)) if math.prod(shape) > fair else 1
