"""Argument parsing shared by all verbs.

Options are spelled with underscores, as in the launcher that users come from, and dashes are
accepted everywhere: `--resume-training` is `--resume_training`.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rollforward.config.elsewhere import OPTIONS
from rollforward.position import Position
from rollforward.wording import plain_lines

_PATHS = frozenset({"DIR", "FILE", "FOLDER", "RUN", "NEW", "RUN[:POSITION]", "A", "B"})
"""The placeholders in the help for values of options and arguments that are paths."""


ARGS = "ARGS"
"""The placeholder for a value that consists of arguments of another program."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that shows one spelling of each option, at the same width on every terminal."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spelled, action.option_strings = action.option_strings, first_spellings(action.option_strings)
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spelled


class Parser(argparse.ArgumentParser):
    """An argument parser that takes both spellings and names the nearest option to a wrong one."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **keywords)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; the value of an option whose metavar is ARGS may begin with a dash."""
        words = list(sys.argv[1:] if args is None else args)
        for action in self._actions:
            if action.metavar == ARGS:
                words = _joined(words, action.option_strings)
        return super().parse_known_args(words, namespace)

    def add_argument(self, *names: str, **keywords: Any) -> argparse.Action:
        """As in argparse; in paths `~` is the home folder, also in `--out=~/new`."""
        if keywords.get("metavar") in _PATHS and "type" not in keywords:
            keywords["type"] = path
        return super().add_argument(*names, **keywords)

    def add_option(self, name: str, **keywords: Any) -> None:
        """Add `--some_name`, which may also be written `--some-name`."""
        dashed = "--" + name[2:].replace("_", "-")
        spellings = [name] if dashed == name else [name, dashed]
        self.add_argument(*spellings, **keywords)

    def unknown(self, arguments: Sequence[str]) -> NoReturn:
        """End with an error that names the nearest options."""
        known = [option for action in self._actions for option in first_spellings(action.option_strings)]
        lines = []
        explained = False
        for argument in arguments:
            if explained and not argument.startswith("-"):
                continue  # the value of an option already explained
            spelled = argument.partition("=")[0].replace("-", "_").replace("__", "--", 1)
            theirs = OPTIONS.get(spelled[2:]) if spelled.startswith("--") else None
            explained = theirs is not None and theirs.partition(" ")[0] in known
            close = [theirs] if explained else difflib.get_close_matches(spelled, known, n=1)
            told = f"; did you mean {close[0]}?" if close else ""
            if "--set" in known and "=" in argument and not argument.startswith("-"):
                told = "; --set goes before each key"
            lines.append(f"unknown argument {argument}{told}")
        self.error("\n".join(lines))

    def error(self, message: str) -> NoReturn:
        """Print the message and where to read more on standard error; exit code 2."""
        sys.stderr.write(f"{plain_lines(message)}\nTry: {self.prog} --help\n")
        raise SystemExit(2)


def _joined(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """The words with `--option VALUE` as `--option=VALUE`, up to `--`."""
    found: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            return [*found, word, *left]
        found.append(f"{word}={left.pop(0)}" if word in options and left else word)
    return found


def first_spellings(spellings: Sequence[str]) -> list[str]:
    """The first of each group of spellings that differ only in dashes."""
    seen: dict[str, str] = {}
    for option in spellings:
        seen.setdefault(option.replace("-", "_"), option)
    return list(seen.values())


def split_list(text: str) -> list[str]:
    """`a,b` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def path(text: str) -> str:
    """A path, as an argument type: the shell expands `~` only at the beginning of a word."""
    found = os.path.expanduser(text)  # noqa: PTH111 - "" stays ""
    if found.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"{text}: no such home folder; a folder of this very name is ./{text}"
        )
    return found


def position(text: str) -> Position:
    """`0_20`, as an argument type."""
    try:
        return Position.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_at(text: str) -> tuple[str, Position | None]:
    """`RUN` or `RUN:0_20`: the folder or the address, and the position if one is named."""
    folder, colon, behind = text.rpartition(":")
    try:
        return (folder, Position.parse(behind)) if colon and folder else (text, None)
    except ValueError:
        return text, None


def count(text: str) -> int:
    """A whole number, at least 1, as an argument type."""
    return _whole_number(text, low=1)


def count_from_0(text: str) -> int:
    """A whole number, at least 0, as an argument type."""
    return _whole_number(text, low=0)


def _whole_number(text: str, *, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"expected a whole number from {low} on, got {text!r}")
    return value
