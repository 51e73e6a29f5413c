"""`rollforward report` on the command line."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

import rollforward
from rollforward.cli.main import main
from rollforward.inspection.report import page
from rollforward.inspection.report.page import MARK, language_of, write_page

NAMES_OF_DATA = ("finished", "failed", "stopped", "killed", "running", "pruned", "ok", "note")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with rollforward.open_run(tmp_path / "run", log=lambda _: None) as loop:
        loop.restore({"policy": {"w": np.zeros(2, dtype=np.float32)}})
        loop.checkpoint(0, {"policy": {"w": np.zeros(2, dtype=np.float32)}})
    return tmp_path / "run"


def test_what_is_missing_for_the_charts_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    page._library.cache_clear()
    assert main(["report", str(run), "--out", str(run.parent / "report.html")]) == 2
    said = capsys.readouterr().err
    assert said == "the charts of a report need plotly: pip install 'rollforward[report]'\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--serve", "--out", "x.html"], "--serve and --out: one of them"),
        (["--port", "1"], "--port is for --serve"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["report", str(run), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_report_is_not_replaced(run: Path, tmp_path: Path) -> None:
    for path in (run / "run.lock", tmp_path):
        with pytest.raises(rollforward.errors.ConfigError, match="is there already, and is not a report"):
            write_page(path, MARK)
    write_page(tmp_path / "new" / "report.html", MARK + b"1")
    write_page(tmp_path / "new" / "report.html", MARK + b"2")
    assert (tmp_path / "new" / "report.html").read_bytes() == MARK + b"2"


@pytest.mark.parametrize(
    ("locale", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "zh_TW"}, "zh"),
        ({"LC_ALL": "", "LANG": "zh"}, "zh"),
        ({"LANG": "fr_FR"}, "en"),
        ({}, "en"),
    ],
)
def test_the_language_is_that_of_the_locale(locale: dict[str, str], language: str) -> None:
    assert language_of(locale) == language


def test_both_languages_have_the_same_words_with_the_same_places() -> None:
    texts = json.loads(page._file("texts.json"))
    assert set(texts) == set(page.LANGUAGES)
    assert texts["en"].keys() == texts["zh"].keys()
    for key, words in texts["en"].items():
        assert sorted(re.findall(r"\{\d\}", words)) == sorted(re.findall(r"\{\d\}", texts["zh"][key])), key


def test_every_word_that_the_scripts_ask_for_is_there() -> None:
    texts = json.loads(page._file("texts.json"))["en"]
    script = page._script()
    asked = set(re.findall(r'say\("(\w+)"', script))
    made = set(re.findall(r"say\(`(\w+)\$\{", script))
    assert asked <= texts.keys()
    for prefix in made:
        assert any(key.startswith(prefix) for key in texts), prefix
    unused = {key for key in texts if f'"{key}"' not in script and not any(key.startswith(p) for p in made)}
    # Words of the timeline come by the names of its data.
    assert unused <= {"needs_script", *NAMES_OF_DATA}
