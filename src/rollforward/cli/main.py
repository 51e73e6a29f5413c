"""The command `rollforward VERB`: finds the verb, runs it, turns errors into messages and exit codes.

    0    done
    1    something failed: the disk, a verifier, a worker, the framework
    2    the request is invalid: a wrong option, key, file or folder; nothing was changed
    130  stopped by Ctrl-C
    143  stopped by SIGTERM

An error is one message, followed by what to try, without a traceback unless `--debug` is given.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from rollforward.cli.arguments import Parser
from rollforward.errors import RollforwardError
from rollforward.processes import reports, stopping
from rollforward.processes.reports import error_text
from rollforward.processes.stopping import Stopped
from rollforward.processes.streams import Forgiven, guard_descriptors, reason
from rollforward.storage.address import use_options
from rollforward.wording import plain_lines

VERBS = (
    "train",
    "inspect",
    "verify",
    "diff",
    "prune",
    "rollouts",
    "history",
    "report",
    "rebuild",
    "copy",
    "export",
    "doctor",
    "prove",
)
"""Each is a module beside this one."""


def verb_modules(verbs: Sequence[str] = VERBS) -> list[ModuleType]:
    """The modules of verbs. Imported late: the signal handlers must be set up before NumPy is imported."""
    return [import_module(f"rollforward.cli.{verb}") for verb in verbs]


def build_parser(verbs: Sequence[str] = VERBS) -> Parser:
    """The command line with these verbs."""
    parser = Parser(
        prog="rollforward",
        description="Exact crash recovery for reinforcement-learning post-training of language models.",
    )
    below_it = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for verb in verb_modules(verbs):
        below = below_it.add_parser(verb.NAME, help=verb.SUMMARY, description=verb.DESCRIPTION)
        verb.add_arguments(below)
        below.add_option(
            "--storage_option",
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="for s3://, besides the AWS_* variables, as in endpoint=http://...; never written anywhere",
        )
        below.add_option("--debug", action="store_true", help="show the traceback of an error")
        below.set_defaults(verb_parser=below, run=verb.run, takes_command=hasattr(verb, "COMMAND"))
        if hasattr(verb, "COMMAND"):
            below.usage = f"{below.format_usage().removeprefix('usage: ').rstrip()} {verb.COMMAND}"
    return parser


def parse(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what is not one of them. What follows `--` is `command`, for verbs that start one."""
    at = given.index("--") if "--" in given else len(given)
    own, behind = given[:at], given[at:]
    # A verb that is named needs no other: importing all of them takes a quarter of a start's imports.
    named = own[:1] if own and own[0] in VERBS else VERBS
    options, unknown = build_parser(named).parse_known_args(own)
    options.command = list(behind[1:]) if options.takes_command else []
    return options, unknown if options.takes_command else [*unknown, *behind]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with Forgiven() as streams:
        code = _main(given)
        streams.output.flush()
        lost = streams.output.lost
        if lost is not None and not code and not _computes(given) and not isinstance(lost, BrokenPipeError):
            # A reader that closed the pipe wanted no more; any other would think the output complete.
            sys.stderr.write(f"standard output: {reason(lost)}: what was printed is not complete\n")
            code = 1
    return code


def _computes(given: Sequence[str]) -> bool:
    """Whether the verb is one that trains: its printed output is not its purpose."""
    return bool(given) and given[0] in ("train", "rebuild")


def _main(given: list[str]) -> int:
    code, message, kind = 0, None, None
    debug = "--debug" in (given[: given.index("--")] if "--" in given else given)
    try:
        reports.join()
        options, unknown = parse(given)
        if unknown:
            options.verb_parser.unknown(unknown)
        use_options(options.storage_option)
        code = _run(options, given)
    except RollforwardError as error:
        code, message, kind = error.exit_code, error_text(error), type(error).__name__
        if debug:
            traceback.print_exc()
    except Stopped as stop:
        code, kind = stop.exit_code, type(stop).__name__
        message = str(stop) if _computes(given) else stop.told
    except Exception as error:
        told = reports.as_ours(error)
        code, message, kind = 1, error_text(told), type(told).__name__
        if told is error:
            message += "\nTry: --debug for where it happened"
        if debug:
            traceback.print_exc()
    if message is not None:
        sys.stderr.write(plain_lines(message) + "\n")
    reports.tell_ending(code, error=message, kind=kind)
    return code


def _run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """The verb's own work."""
    try:
        code: int = options.run(options, given)
        return code
    except SystemExit as error:
        # User code that a verb called: its exit says nothing about how the verb's own work ended.
        given_code = "" if error.code is None else repr(error.code)
        raise RollforwardError(
            f"exit({given_code}) was called within rollforward {options.verb}",
            hint="--debug shows where; a verifier must not end the process",
        ) from error


def run_process(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `main` as the whole of this process."""
    guard_descriptors()
    stopping.take_signals()
    code = main(arguments)
    if code:
        stopping.leave(code)
    sys.exit(0)


if __name__ == "__main__":
    run_process()
