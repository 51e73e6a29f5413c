"""`rollforward export`: a checkpoint in the folder layout of Hugging Face or MindRLHF."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rollforward.cli.arguments import Parser, run_at
from rollforward.run.listing import checkpoint_at, new_folder, open_run
from rollforward.store.exporting import EXPORTS

NAME = "export"
SUMMARY = "write a checkpoint for Hugging Face or MindRLHF"
DESCRIPTION = """\
Write a checkpoint into a new folder, laid out for others. Every byte is verified on the way, and
the run is not changed.
  rollforward export RUN:0_20 --to FOLDER --format huggingface

huggingface: the policy with config.json and the tokenizer's files, to be opened by transformers, or
by --actor_checkpoint_path of a new run. mindrlhf: policy, optimizer and reference with meta.json, as
MindRLHF resumes from on one rank, under MindFormers' names.

One line is printed for each file. Without a position it is the newest valid checkpoint."""


def add_arguments(parser: Parser) -> None:
    """The options of `export`."""
    parser.add_argument("checkpoint", metavar="RUN[:POSITION]", help="the run's folder, and a position")
    parser.add_option("--to", metavar="FOLDER", required=True, help="a new folder, or an empty one")
    parser.add_option("--format", choices=sorted(EXPORTS), default="huggingface", help="for whom")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Write the folder."""
    folder, position = run_at(options.checkpoint)
    storage, out = open_run(folder), Path(options.to)
    manifest = checkpoint_at(storage, position)
    for path in EXPORTS[options.format](storage, manifest, new_folder(out)):
        sys.stdout.write(f"{out / path}\n")
    return 0
