"""Ids, rendered chats and decoded text are those of transformers 5, for golden tokenizers and templates."""

import datetime
import json
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pytest

from rollforward.data.chats import Chats
from rollforward.data.folder import read_folder
from rollforward.data.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizers"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
FOLDERS = sorted(EXPECTED["folders"])
TEMPLATES = sorted(path.stem for path in (GOLDEN / "templates").glob("*.jinja"))
TODAY = datetime.date.fromisoformat(EXPECTED["today"])


@cache
def tokenizer(folder: str) -> Tokenizer:
    return Tokenizer(GOLDEN / "folders" / folder)


def source(template: str) -> str:
    return (GOLDEN / "templates" / f"{template}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats_are_rendered_and_encoded_as_transformers_does(template: str) -> None:
    cases = [case for case in EXPECTED["cases"] if case["template"] == template]
    assert {case["chat"] for case in cases} == EXPECTED["chats"].keys()
    for case in cases:
        tokens = read_folder(GOLDEN / "folders" / case["folder"]).tokens
        chats = Chats(source(template), tokens, TODAY)
        where = f"{case['folder']}, {case['chat']}"
        chat = EXPECTED["chats"][case["chat"]]
        if "error" in case:
            with pytest.raises((ValueError, jinja2.TemplateError)):
                print(where, chats.render(chat))
            continue
        text = chats.render(chat)
        assert text == case["text"], where
        assert tokenizer(case["folder"]).encode_rendered(text) == case["ids"], where


@pytest.mark.parametrize("folder", FOLDERS)
def test_text_is_encoded_and_decoded_as_transformers_does(folder: str) -> None:
    ours, theirs = tokenizer(folder), EXPECTED["folders"][folder]
    for case in theirs["texts"]:
        ids, plain = case["ids"], case["plain"]
        assert ours.encode_rendered(case["text"]) == plain, case["text"]
        assert ours.encode(case["text"]) == without_doubles(ids, plain), case["text"]
        assert ours.decode(ids) == case["decoded"], case["text"]


def without_doubles(ids: list[int], plain: list[int]) -> list[int]:
    """What we do otherwise: no first or last token is put where the text has it already."""
    if len(ids) == len(plain) + 1:
        if ids[1:] == plain and ids[:1] == plain[:1]:
            return plain
        if ids[:-1] == plain and ids[-1:] == plain[-1:]:
            return plain
    if len(ids) == len(plain) + 2 and ids[1:-1] == plain:
        first = [] if ids[:1] == plain[:1] else ids[:1]
        last = [] if ids[-1:] == plain[-1:] else ids[-1:]
        return [*first, *plain, *last]
    return ids


@pytest.mark.parametrize("folder", FOLDERS)
def test_special_tokens_are_those_that_transformers_finds(folder: str) -> None:
    ours, theirs = tokenizer(folder), EXPECTED["folders"][folder]
    assert read_folder(GOLDEN / "folders" / folder).tokens == theirs["special_tokens"]
    assert ours.eos_token_ids == (theirs["eos_token_id"],)
    # Where no token is named to pad with, the end token is used, as in TRL.
    assert ours.pad_token_id == (
        theirs["eos_token_id"] if theirs["pad_token_id"] is None else theirs["pad_token_id"]
    )


def test_a_whole_folder_renders_with_the_template_beside_it(tmp_path: Path) -> None:
    """The same through the door that training uses, and with the process that renders."""
    cases = [case for case in EXPECTED["cases"] if "error" not in case][::97]
    assert len(cases) > 5
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in (GOLDEN / "folders" / case["folder"]).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "chat_template.jinja").write_text(source(case["template"]), encoding="utf-8")
        ours = Tokenizer(folder, today=TODAY)
        assert ours.render(EXPECTED["chats"][case["chat"]]) == case["text"]


def test_the_golden_cases_cover_what_they_promise() -> None:
    assert len(TEMPLATES) > 24
    assert len(FOLDERS) > 10
    texts = [case for folder in EXPECTED["folders"].values() for case in folder["texts"]]
    assert any(without_doubles(case["ids"], case["plain"]) != case["ids"] for case in texts)
    assert sum("error" in case for case in EXPECTED["cases"]) > 100
    assert sum("text" in case for case in EXPECTED["cases"]) > 700
