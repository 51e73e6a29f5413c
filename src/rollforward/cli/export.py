"""`rollforward export`: a checkpoint in the folder layout of Hugging Face or MindRLHF."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rollforward.cli.arguments import Parser, count, run_at
from rollforward.cli.choosing import chosen
from rollforward.cli.output import print_json, print_line
from rollforward.errors import InputError
from rollforward.inspection.folder import checkpoint_at, new_folder, open_run, telling_where
from rollforward.interop.adapters import export_merged
from rollforward.interop.exporting import EXPORTS, Export, export_mindrlhf

NAME = "export"
SUMMARY = "write a checkpoint for Hugging Face, MindRLHF or TRL"
_TRL = "trl"
DESCRIPTION = """\
Write a checkpoint into a new folder, laid out for others. Every byte is verified on the way, and
the run is not changed.
  rollforward export RUN:0_20 --to FOLDER --format huggingface

huggingface: the policy with config.json and the tokenizer's files, to be opened by transformers, or
by --actor_checkpoint_path of a new run. Of a run of adapters (actor_config.lora) it is the adapters, as
PEFT opens them; with --merge it is base and adapters as one model. mindrlhf: policy, optimizer and
reference with meta.json, as MindRLHF resumes from on one rank, under MindFormers' names; with
--model_parallel on as many, each with its slice, and strategy files. trl: a run of rollforward.trl as TRL's
own checkpoint-N; it needs the extra trl.

One line is printed for each file. Without a position it is the newest valid checkpoint. config.json
names the element type of the file that is written. What fails leaves the new folder empty; what is
killed leaves no config.json, no adapter_config.json and no meta.json of the policy, without which
nobody opens the folder."""


def add_arguments(parser: Parser) -> None:
    """The options of `export`."""
    parser.add_argument("checkpoint", metavar="RUN[:POSITION]", help="the run's folder, and a position")
    parser.add_option("--to", metavar="FOLDER", required=True, help="a new folder, or an empty one")
    parser.add_option("--format", choices=sorted([*EXPORTS, _TRL]), default="huggingface", help="for whom")
    parser.add_option("--merge", action="store_true", help="adapters: the whole model, with its base")
    parser.add_option("--base", metavar="FOLDER", help="with --merge: where the base is, if it was moved")
    parser.add_option(
        "--model_parallel", metavar="N", type=count, help="with mindrlhf: over how many ranks to cut"
    )
    parser.add_option("--json", action="store_true", help="print what was written as JSON")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Write the folder."""
    folder, position = run_at(options.checkpoint)
    storage, out = open_run(folder), Path(options.to)
    manifest = chosen(folder, checkpoint_at(storage, position))
    target = new_folder(out)
    export = _wanted(options)
    with telling_where(storage), _emptied_when_it_fails(out):
        written = [str(out / path) for path in export(storage, manifest, target)]
    if options.json:
        value = {
            "folder": str(folder),
            "position": str(manifest.position),
            "format": options.format,
            "to": str(out),
            "files": written,
        }
        print_json(value)
    else:
        for path in written:
            print_line(path)
    return 0


def _wanted(options: argparse.Namespace) -> Export:
    """InputError for options that do not go together."""
    if options.model_parallel is not None and options.format != "mindrlhf":
        raise InputError(
            "--model_parallel cuts what --format mindrlhf writes",
            hint="add that, or leave --model_parallel out",
        )
    if options.merge or options.base:
        return _merging(options)
    if options.model_parallel is not None:
        return partial(export_mindrlhf, ranks=options.model_parallel)
    return EXPORTS.get(options.format) or _trl()


def _merging(options: argparse.Namespace) -> Export:
    """Adapters and their base as one model."""
    if options.format != "huggingface" or not options.merge:
        raise InputError(
            f"--merge writes a Hugging Face folder, not --format {options.format}"
            if options.merge
            else "--base says where the base is that adapters are merged with",
            hint="leave --format out" if options.merge else "add --merge",
        )
    return partial(export_merged, base=None if options.base is None else Path(options.base))


def _trl() -> Export:
    """PyTorch writes its own files."""
    try:
        from rollforward.trl.exporting import export_trl
    except ModuleNotFoundError as error:
        raise InputError(
            f"--format trl needs {error.name}, which is not installed", hint="pip install 'rollforward[trl]'"
        ) from error
    return export_trl


@contextmanager
def _emptied_when_it_fails(out: Path) -> Iterator[None]:
    """A partial export must not be mistaken for a complete one, and the next try needs an empty folder."""
    try:
        yield
    except BaseException:
        for path in sorted(out.rglob("*"), reverse=True):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise
