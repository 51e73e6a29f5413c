"""One start for `test_engine_compiling.py`: `[msrun ...] graphs_process.py FOLDER KNOWN NAME...`.

It compiles and runs graphs. A name is `times_3`, a graph with a constant in it, or `plus-4`, one of the shape
4. KNOWN 1: kept ones by shape come first; 2: also, parameters have other names. Prints, for each, what it
computed of twos, and whether it was taken from the folder; and then, as a process that goes on working would,
compiles one more graph that nobody keeps.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "conformance"))

from engine_case import SETTINGS

from rollforward.engines.mindspore.compiling import Graphs
from rollforward.engines.mindspore.memory import use_device
from rollforward.engines.mindspore.parallel import connect, serve_scheduler


class Times(nn.Cell):
    """The input, a parameter and a constant multiplied: the constant is compiled into the graph."""

    def __init__(self, factor: int, name: str = "weight") -> None:
        super().__init__()
        self.factor = float(factor)
        self.weight = ms.Parameter(np.full(3, 10, np.float32), name=name)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return x * self.weight * self.factor


class Plus(nn.Cell):
    """The input and its length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = float(length)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return x + self.length


def twos(length: int) -> ms.Tensor:
    return ms.Tensor(np.full(length, 2, np.float32))


def main(folder: str, known: str, *names: str) -> None:
    use_device("CPU")
    graphs = Graphs(replace(SETTINGS, compile_cache_folder=folder), connect())
    plus = graphs.by_shape("plus", lambda length: (Plus(length), (twos(length),)))
    if known != "0":
        graphs.compile_kept()
    found = {}
    for name in names:
        kind, number = name.replace("-", "_").split("_")
        if kind == "plus":
            cell, given = plus.at(int(number)), twos(int(number))
        else:
            cell, given = Times(int(number), "other" if known == "2" else "weight"), twos(3)
            graphs.compile(name, cell, given)
        found[name] = [float(cell(given).asnumpy()[0]), graphs.taken[name]]
    found["unkept"] = [float(Times(7)(twos(3)).asnumpy()[0]), False]
    print(json.dumps(found))


if __name__ == "__main__":
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        serve_scheduler()
    main(*sys.argv[1:])
