"""`rollforward report`: a page to look at runs with."""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from rollforward.cli.arguments import Parser, count_from_0, position
from rollforward.cli.output import print_line
from rollforward.errors import ConfigError
from rollforward.processes.stopping import Stopped
from rollforward.wording import in_bytes

NAME = "report"
SUMMARY = "make a page that shows runs: curves, timeline, rollouts, health"
DESCRIPTION = """\
Make one HTML file that shows one or several runs: the curves of all figures, over each other, with
kills, resumes and checkpoints; each start on a timeline, and what it cost; the prompts, completions
and rewards of steps, sorted, filtered and compared; what verify and doctor say. It needs no network
and opens by double click. With --serve the same page comes from 127.0.0.1 and follows runs that are
under way, until Ctrl-C.

The runs are only read. Of a run of many steps the curves keep the extremes of every stretch, and the
rollouts are those of the last step, the first, the middle, and so on; --all_rollouts shows more
steps, whole. Every byte of a run is verified if it has at most 1 GB; --deep verifies any run so.

Needs more than the core: pip install 'rollforward[report]'."""


def add_arguments(parser: Parser) -> None:
    """The options of `report`."""
    parser.add_argument(
        "folders", metavar="RUN", nargs="+", help="the folders of the runs (--save_checkpoint_dir)"
    )
    parser.add_option(
        "--out", metavar="FILE", default=None, help="where the page goes (default: report.html)"
    )
    parser.add_option("--serve", action="store_true", help="serve the page on 127.0.0.1 instead")
    parser.add_option(
        "--port", metavar="N", type=count_from_0, default=None, help="for --serve; 0: any (default: 7474)"
    )
    parser.add_option(
        "--language", choices=("en", "zh"), default=None, help="of the page (default: by the locale)"
    )
    parser.add_option(
        "--all_rollouts",
        metavar="STEP",
        nargs="+",
        type=position,
        default=[],
        help="show all rollouts of these steps, as in 0_37",
    )
    parser.add_option("--deep", action="store_true", help="read and digest every byte of any run")


def run(options: argparse.Namespace, _arguments: Sequence[str]) -> int:
    """Write the page, or serve it."""
    # Only this verb needs a server.
    from rollforward.inspection.report.gathering import about, gather, readers_of
    from rollforward.inspection.report.page import language_of, make_page, write_page
    from rollforward.inspection.report.serving import PORT, Server

    if options.serve and options.out is not None:
        raise ConfigError("--serve and --out: one of them")
    if options.port is not None and not options.serve:
        raise ConfigError("--port is for --serve")
    language = options.language or language_of(os.environ)
    readers = readers_of(options.folders, whole=options.all_rollouts, deep=options.deep)
    if options.serve:
        port = PORT if options.port is None else options.port
        with Server(readers, about(readers), port=port, language=language) as server:
            try:
                print_line(f"{server.address} shows the runs until Ctrl-C")
                server.serve()
            except Stopped as stop:
                if stop.exit_code != 128 + signal.SIGINT:
                    raise
        return 0
    out = Path(options.out or "report.html")
    page = make_page(about(readers) | {"parts": gather(readers)}, language=language, live=False)
    write_page(out, page)
    print_line(f"{out}: {in_bytes(len(page))}, opens in any browser")
    return 0
