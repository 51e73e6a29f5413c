"""What reaches the numbers is compared at the resume: what changed is named, and what follows from it."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_session import Killed, Place, ToyPackage, commit_at_once

from rollforward import verifiers
from rollforward.grpo.types import Prompt
from rollforward.position import Position
from rollforward.run import facts
from rollforward.run.session import train

VERIFIER = """
def by_column(completions, bonus):
    return [b * sum(c.isdigit() for c in text) - len(text) / 8 for text, b in zip(completions, bonus)]
"""
ANEW = "warning: steps finished after the checkpoint are generated anew, as the run is now"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commit_at_once(monkeypatch)
    return Place(tmp_path)


def edit_rows(place: Place, edit: Callable[[int, dict[str, Any]], object]) -> None:
    rows = [json.loads(line) for line in place.dataset.read_text().splitlines()]
    for index, row in enumerate(rows):
        edit(index, row)
    place.dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))


def killed_and_resumed(
    place: Place, capsys: pytest.CaptureFixture[str], change: Callable[[], object], **changes: Any
) -> tuple[str, list[str]]:
    """The log of a resume after the change, and its warnings."""
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=5), **changes)
    capsys.readouterr()
    change()
    place.train("run", resume=True, **changes)
    log = capsys.readouterr().out
    return log, [line for line in log.splitlines() if line.startswith("warning: ")]


def test_nothing_changed_and_nothing_is_said(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    log, warned = killed_and_resumed(place, capsys, lambda: None)
    assert warned == []
    assert "lost: nothing" in log


def test_a_column_that_a_verifier_uses(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.root / "bycolumn.py").write_text(VERIFIER)

    def shifted(by: int) -> None:
        edit_rows(place, lambda index, row: row.update(bonus=(index + by) % 3, other=index))

    shifted(0)
    named = {"reward_config__verifier_function": ["bycolumn:by_column"]}
    log, warned = killed_and_resumed(place, capsys, lambda: shifted(1), **named)
    assert warned == [
        "warning: since the checkpoint was saved column 'bonus' of the dataset changed",
        ANEW,
    ]
    assert "2 finished steps from 0_3 on" in log
    assert "made with another configuration, generated anew with that of now" in log


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda row: row.update(answer="x"), "the dataset's prompts, as tokens, or its answers changed"),
        (lambda row: row.update(hint="new"), "column 'hint' of the dataset is new"),
        (lambda row: row.pop("level"), "column 'level' of the dataset is gone"),
        (lambda row: row.update(level=[1]), "column 'level' of the dataset changed"),
    ],
)
def test_every_part_of_the_dataset(
    place: Place, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit_rows(place, lambda index, row: row.update(level=index))
    _, warned = killed_and_resumed(place, capsys, lambda: edit_rows(place, lambda _, row: edit(row)))
    assert warned == [f"warning: since the checkpoint was saved {said}", ANEW]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "generation_config.json",
            '{"eos_token_id": [5, 6, 7]}',
            ["end_tokens changed from", "generation_config.json of the tokenizer is new"],
        ),
        ("chat_template.jinja", "{{ messages }}", ["chat_template.jinja of the tokenizer is new"]),
        ("special_tokens_map.json", "{}", ["special_tokens_map.json of the tokenizer is new"]),
    ],
)
def test_every_file_of_the_tokenizer(
    place: Place, capsys: pytest.CaptureFixture[str], name: str, content: str, said: list[str]
) -> None:
    folder = str(place.model)
    _, warned = killed_and_resumed(
        place, capsys, lambda: (place.model / name).write_text(content), rl_config__tokenizer_dir=folder
    )
    assert len(warned) == len(said) + 1
    assert all(part in line for part, line in zip(said, warned, strict=False))
    assert warned[-1] == ANEW
    # What the run reads is what it carries from then on.
    place.train("run", resume=True)
    assert "warning" not in capsys.readouterr().out


def test_files_that_no_manifest_names_are_not_read(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.train("whole")

    def plant() -> None:
        (place.root / "run/model/generation_config.json").write_text('{"eos_token_id": [5, 6, 7]}')
        (place.root / "run/model/chat_template.jinja").write_text("{{ broken")

    log, warned = killed_and_resumed(place, capsys, plant)
    assert warned == []
    assert "lost: nothing" in log
    assert place.digests("run") == place.digests("whole")


def test_the_source_of_a_verifier(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """What was finished keeps the rewards that it has: they are in the journal."""
    source = place.root / "mine.py"
    source.write_text("def reward(completions):\n    return [float(len(text)) for text in completions]\n")

    def mend() -> None:
        source.write_text(
            "def reward(completions):\n    return [-float(len(text)) for text in completions]\n"
        )
        del sys.modules["mine"]

    log, warned = killed_and_resumed(place, capsys, mend, reward_config__verifier_function=["mine:reward"])
    assert warned == [
        "warning: since the checkpoint was saved the source of verifier mine:reward changed: finished steps "
        "keep the rewards that were recorded, new ones get those of now"
    ]
    assert "lost: nothing" in log


def test_a_variable_that_changes_the_arithmetic(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NPY_DISABLE_CPU_FEATURES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def change() -> None:
        monkeypatch.setenv("NPY_DISABLE_CPU_FEATURES", "AVX512F")
        monkeypatch.setenv("TOY_ARITHMETIC", "fast")
        monkeypatch.setenv("OMP_NUM_THREADS", "2")

    log, warned = killed_and_resumed(place, capsys, change)
    assert [line.partition("changed")[0] for line in warned] == [
        "warning: the version of $NPY_DISABLE_CPU_FEATURES ",
        "warning: the version of $TOY_ARITHMETIC ",
    ]
    assert "lost: nothing" in log


def test_a_run_of_a_version_that_knew_less_is_replayed(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it did not know is no change; its journal is of this configuration."""
    place.train("whole")
    plan = place.plan("run")
    newer = ("end_tokens", "pad_token", "file ", "dataset_", "verifier ")
    knew = {name: value for name, value in plan.facts.items() if not name.startswith(newer)}
    assert len(knew) < len(plan.facts)
    with pytest.raises(Killed):
        train(replace(plan, facts=knew), ToyPackage(dies_at_update=5))
    capsys.readouterr()
    with pytest.raises(Killed):
        place.train("run", ToyPackage(dies_at_update=1), resume=True)
    log = capsys.readouterr().out
    assert "3 steps to replay" in log
    assert "lost: nothing" in log
    assert "warning" not in log
    # Now records of both versions follow the checkpoint.
    place.train("run", resume=True)
    log = capsys.readouterr().out
    assert "3 steps to replay" in log
    assert "lost: nothing" in log
    assert place.digests("run") == place.digests("whole")


def test_a_branch_off_such_a_run_is_reached(place: Place) -> None:
    plan = place.plan("run")
    knew = {name: value for name, value in plan.facts.items() if not name.startswith(("file ", "dataset_"))}
    train(replace(plan, facts=knew), ToyPackage())
    place.train("new", resume=True, source="run", asked={"position": Position(0, 4), "rebuild": True})
    assert (place.root / "new/commits/0_4.json").is_file()


def test_what_json_does_not_have_is_compared_without_chance() -> None:
    class Thing:
        pass

    def of(value: Any) -> Any:
        prompt = Prompt(index=0, text="1", token_ids=(1,), answer="1", columns={"given": value})
        return facts.of_dataset([prompt])

    words = ["alpha", "beta", "gamma", "delta"]
    assert of({1: set(words), "a": (1, 2)}) == of({"a": [1, 2], 1: frozenset(reversed(words))})
    assert of(Thing()) == of(Thing())
    assert of([1]) != of([2])


def test_the_dataset_is_compared_with_what_the_first_version_wrote() -> None:
    """Its digest stands in checkpoints that are to be resumed for good."""
    prompts = [
        Prompt(index=0, text="1+1=", token_ids=(1, 2), answer="2", columns={}),
        Prompt(index=1, text="2+1=", token_ids=(3,), answer="3", columns={"level": 1}),
    ]
    expected = "f153ba1abb3585a5a2deb686543865961fa59688054db800060c7ca7855a0cb7"
    assert facts.of_dataset(prompts)["dataset"] == expected


def test_a_verifier_that_has_no_source_is_unknown() -> None:
    found = verifiers.describe(verifiers.resolve(["accuracy_reward", "builtins:sorted"]))
    assert found["builtins:sorted"] == "unknown"
    assert found["math-verify"] not in ("", "none")
    assert len(found["accuracy_reward"]) == 64
