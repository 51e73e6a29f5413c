"""What a run is shown stays what it was at its first start."""

import datetime
import json
import os
from pathlib import Path

import pytest
from toy_session import Killed, Place, ToyPackage

from rollforward.errors import InputError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path)
    chats = [
        {"prompt": [{"role": "user", "content": f"{a}+{b}="}], "answer": str(a + b)}
        for a in range(5)
        for b in range(4)
    ]
    place.dataset.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (place.model / "chat_template.jinja").write_text("{{ strftime_now('%d') }}{{ messages[0].content }}")
    return place


def on(monkeypatch: pytest.MonkeyPatch, year: int, month: int, day: int) -> None:
    class Day(datetime.date):
        @classmethod
        def today(cls) -> "Day":
            return cls(year, month, day)

    monkeypatch.setattr(datetime, "date", Day)


def test_a_run_that_is_resumed_on_another_day_has_the_prompts_of_its_first(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on(monkeypatch, 2026, 7, 4)
    place.train("whole")
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=5))
    on(monkeypatch, 2026, 7, 15)
    capsys.readouterr()
    plan = place.plan("run", resume=True)
    assert plan.prompts[0].text == "040+0="
    assert plan.facts["chat_date"] == "2026-07-04"
    place.train("run", resume=True)
    assert "changed from" not in capsys.readouterr().out
    assert place.digests("run") == place.digests("whole")
    assert place.plan("other").prompts[0].text == "150+0="


def test_a_template_that_does_not_ask_for_the_date_leaves_none_in_the_facts(place: Place) -> None:
    (place.model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "chat_date" not in place.plan("run").facts


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "train.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_a_start_with_a_file_that_is_not_one_ends_at_once(place: Place, name: str, kind: str) -> None:
    path = place.dataset if name == "train.jsonl" else place.model / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)
    with pytest.raises(InputError, match=name):
        place.plan("run")
