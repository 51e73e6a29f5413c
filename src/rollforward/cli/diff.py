"""`rollforward diff`: the tensors that differ between two checkpoints, and by how much."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Column, Table

from rollforward.cli.arguments import Parser, run_at
from rollforward.cli.choosing import chosen
from rollforward.cli.output import cell, print_json, print_line
from rollforward.inspection.comparing import CheckpointGone, Stored, TensorDifference, compare, stored
from rollforward.inspection.folder import checkpoint_at, open_run

NAME = "diff"
SUMMARY = "compare two checkpoints, tensor by tensor"
DESCRIPTION = """\
Compare two checkpoints, tensor by tensor. Each is a run's folder, for its newest valid
checkpoint, or a folder and a position, as in RUN:0_20. They may be of one run or of two. Tensors
with equal digests are equal; of the others every byte is read and verified.

On a terminal the differences are a table, elsewhere one line a tensor: role, name, what differs
(values, dtype or shape, only in A, only in B), how many elements, the largest absolute difference,
and the norm of the difference over the norm of A, with tabs between; BF16 is compared as numbers.
The exit code is 0 when no tensor differs, 1 when one does."""


def add_arguments(parser: Parser) -> None:
    """The options of `diff`."""
    parser.add_argument("a", metavar="A", help="RUN or RUN:0_20")
    parser.add_argument("b", metavar="B", help="RUN or RUN:0_20")
    parser.add_option("--json", action="store_true", help="print the differences as JSON")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Print the differences."""
    folder_a, at_a = run_at(options.a)
    folder_b, at_b = run_at(options.b)
    storage_a, storage_b = open_run(folder_a), open_run(folder_b)
    while True:
        a = chosen(folder_a, checkpoint_at(storage_a, at_a))
        b = chosen(folder_b, checkpoint_at(storage_b, at_b))
        try:
            one, other = stored(storage_a, a), stored(storage_b, b)
            found = compare(one, other)
            break
        except CheckpointGone:
            # In a run that is training, the newest checkpoint is another one by now.
            if at_a is not None and at_b is not None:
                raise
    if options.json:
        value = {
            "a": {"folder": str(folder_a), "position": str(a.position)},
            "b": {"folder": str(folder_b), "position": str(b.position)},
            "tensors": len(one.tensors.keys() | other.tensors.keys()),
            "differences": [_as_json(item) for item in found],
        }
        print_json(value)
    elif sys.stdout.isatty():
        _table(found, one, other)
    else:
        for item in found:
            figures = [str(item.elements), f"{item.largest:.9g}", f"{item.relative:.9g}"]
            print_line(item.role, item.name, item.what, *figures)
    return 1 if found else 0


def _as_json(item: TensorDifference) -> dict[str, object]:
    """JSON has no NaN or infinity: they are written as strings."""
    value = asdict(item)
    for name in ("largest", "relative"):
        number = value[name]
        value[name] = number if abs(number) < float("inf") else str(number)
    return value


def _table(found: Sequence[TensorDifference], one: Stored, other: Stored) -> None:
    console = Console()
    a, b = one.manifest, other.manifest
    sizes = {key: tensor.shape for each in (other, one) for key, tensor in each.tensors.items()}
    if not found:
        console.print(
            f"A ({a.position}) and B ({b.position}) have the same bytes in all {len(sizes)} tensors"
        )
        return
    table = Table(
        "role", Column("tensor", overflow="fold"), "shape", "what", "elements", "largest", "relative"
    )
    for item in found:
        figures = [str(item.elements), f"{item.largest:.3g}", f"{item.relative:.3g}"]
        shown = figures if item.what == "values" else ["", "", ""]
        shape = " x ".join(map(str, sizes[item.role, item.name]))
        table.add_row(item.role, cell(item.name), shape, item.what, *shown)
    console.print(table)
    console.print(
        f"{len(found)} of {len(sizes)} tensors differ between A ({a.position}) and B ({b.position})"
    )
