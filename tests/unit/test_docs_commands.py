"""What the pages tell a reader to type is understood by the program, and what they link to is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from rollforward.cli.arguments import Parser
from rollforward.cli.main import build_parser, parse
from rollforward.config.keys import Config
from rollforward.config.schema import walk

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(rollforward [^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SCRIPT = "examples/grpo/main.py"
KEYS = {path for path, _declared, _kind in walk(Config)}


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `rollforward` in a code block; of `msrun`, those of its script."""
    for block in _FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.match(r" *(\.venv/bin/)?(rollforward|msrun) ", line):
                continue
            words = shlex.split(line, comments=True)
            words = words[
                : next((i for i, word in enumerate(words) if word in {"|", ">", "&", "2>&1"}), None)
            ]
            if "msrun" in words[0]:
                assert _SCRIPT in words, line
                yield ["train", *words[words.index(_SCRIPT) + 1 :]]
            else:
                yield words[1:]


def mentions(text: str) -> Iterator[list[str]]:
    """The words of every `rollforward ...` within a line: a verb, perhaps options, not all that it needs."""
    for found in _INLINE.findall(_FENCE.sub("", text)):
        yield found.split()[1:]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def verbs(parser: Parser) -> dict[str, Parser]:
    return next(action.choices for action in parser._actions if isinstance(action.choices, dict))


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_understood(name: str) -> None:
    for words in commands(page(name)):
        options, unknown = parse(words)
        assert not unknown, words
        keys = {text.partition("=")[0] for text in getattr(options, "overrides", [])}
        assert keys <= KEYS, words


@pytest.mark.parametrize("name", PAGES)
def test_verbs_and_options_named_within_a_line_exist(name: str) -> None:
    known = verbs(build_parser())
    for verb, *rest in mentions(page(name)):
        if verb == "VERB":
            continue
        assert verb in known
        there = known[verb].format_help()
        for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", there), (verb, option)


@pytest.mark.parametrize("name", PAGES)
def test_what_is_linked_is_there(name: str) -> None:
    for target in _LINK.findall(_FENCE.sub("", page(name))):
        if "://" not in target and not target.startswith("#"):
            assert (ROOT / name).parent.joinpath(unquote(target.partition("#")[0])).exists(), target


def test_both_readmes_say_the_same() -> None:
    """The same commands, and the same links but those to each other."""
    english, chinese = page("README.md"), page("README_zh.md")
    assert list(commands(english)) == list(commands(chinese))
    assert set(_LINK.findall(english)) ^ set(_LINK.findall(chinese)) == {"README.md", "README_zh.md"}


def test_the_pages_are_found_and_have_commands() -> None:
    """The checks above would pass on nothing."""
    assert {"README.md", "README_zh.md", "docs/tutorial.md", "docs/reference/cli.md"} <= set(PAGES)
    assert len(list(commands(page("README.md")))) >= 6
    assert len(list(commands(page("docs/tutorial.md")))) >= 12
