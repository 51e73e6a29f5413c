"""The demo's task is what its page says: the files can be made again, and nothing held out is practised."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rollforward.config.loading import load
from rollforward.data.dataset import load_dataset
from rollforward.data.tokenizer import Tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic"


@pytest.fixture(autouse=True)
def _as_its_scripts_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))


def test_the_committed_files_are_those_the_scripts_write(tmp_path: Path) -> None:
    import make_data
    import make_tokenizer

    split = make_data.deal()
    for name, problems in (("train.jsonl", split.practice), ("heldout.jsonl", split.held_out)):
        make_data.write(tmp_path / name, problems)
        assert (tmp_path / name).read_bytes() == (EXAMPLE / name).read_bytes()
    make_tokenizer.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((EXAMPLE / "model" / name).read_text())


def test_what_is_held_out_is_nowhere_else_even_swapped() -> None:
    from problems import deal

    split = deal()
    apart = {*split.held_out, *(problem.swapped for problem in split.held_out)}
    assert not apart & set(split.corpus)
    assert set(split.practice) <= set(split.corpus)
    assert len(set(split.corpus) | apart) == 15_050


def test_each_hand_makes_its_own_mistake() -> None:
    from problems import Problem, forgetful_answer, hasty_answer

    assert Problem(48, "+", 76).answer == 124
    assert forgetful_answer(Problem(48, "+", 76)) == 14
    assert forgetful_answer(Problem(52, "-", 17)) == 45
    assert forgetful_answer(Problem(12, "+", 7)) == 19
    random = np.random.Generator(np.random.Philox(0))
    assert all(hasty_answer(Problem(48, "+", 76), random) != 124 for _ in range(50))


def test_the_configuration_the_data_and_the_model_fit_each_other() -> None:
    config = load(str(EXAMPLE / "grpo.yaml")).config
    tokenizer = Tokenizer(EXAMPLE / "model")
    model = json.loads((EXAMPLE / "model" / "config.json").read_text())
    tokenizer.check_fits(model["vocab_size"])
    limit = config.generate_config.max_prompt_length
    problems = load_dataset(str(EXAMPLE / "train.jsonl"), tokenizer, limit)
    load_dataset(str(EXAMPLE / "heldout.jsonl"), tokenizer, limit)
    longest = max(len(tokenizer.encode(problem.answer)) + 1 for problem in problems)
    assert longest <= config.generate_config.sampling_config.max_tokens
    assert (EXAMPLE / "model" / "model.safetensors").stat().st_size < 3_000_000


def teardown_module() -> None:
    for name in ("make_data", "make_tokenizer", "problems"):
        sys.modules.pop(name, None)
