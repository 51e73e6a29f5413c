"""Which problems a dataset holds, and what is said of one that cannot be used."""

import importlib.util
from pathlib import Path

import pytest
from tokenizer_folder import write_tokenizer

from rollforward.data.dataset import load_dataset
from rollforward.data.tokenizer import Tokenizer
from rollforward.errors import DataError

WITH_GYM = importlib.util.find_spec("reasoning_gym") is not None


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path / "model"))


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> Tokenizer:
    template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    return Tokenizer(write_tokenizer(tmp_path / "chat", adds_first_token=True, chat_template=template))


def write(folder: Path, *lines: str) -> str:
    path = folder / "problems.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_problems_are_numbered_in_order_with_their_columns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(
        tmp_path,
        '\ufeff{"prompt": "1+1=", "answer": "2", "level": 1}',
        "",
        '{"prompt": "2+2=", "answer": 4, "level": null}',
    )
    first, second = load_dataset(source, tokenizer, 4)
    assert (first.index, first.text, first.answer, first.columns) == (0, "1+1=", "2", {"level": 1})
    assert (second.index, second.text, second.answer, second.columns) == (1, "2+2=", "4", {"level": None})
    assert first.token_ids == tuple(tokenizer.encode("1+1="))


def test_chat_messages_are_rendered(tmp_path: Path, chat_tokenizer: Tokenizer) -> None:
    source = write(tmp_path, '{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}')
    [prompt] = load_dataset(source, chat_tokenizer, 10)
    assert prompt.text == "1+1="
    assert prompt.token_ids == tuple(chat_tokenizer.encode("1+1=")[1:])


def test_of_many_chats_the_one_that_cannot_be_rendered_is_named(
    tmp_path: Path, chat_tokenizer: Tokenizer
) -> None:
    good = '{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}'
    bad = '{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"}'
    source = write(tmp_path, '{"prompt": "1=", "answer": "1"}', good, "", bad, good)
    with pytest.raises(DataError, match=r"problems\.jsonl:4: .*'image'"):
        load_dataset(source, chat_tokenizer, 10)


def test_a_chat_that_cannot_be_rendered_names_its_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path, '{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}')
    with pytest.raises(DataError, match=r"problems\.jsonl:1: .*no chat template"):
        load_dataset(source, tokenizer, 10)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": "1", "answer": "\\', "not JSON"),
        ('["1", "2"]', "list instead of an object"),
        ('{"prompt": "1+1="}', "no answer; it has prompt"),
        ('{"question": "1", "solution": "2"}', "no prompt and no answer; it has question, solution"),
        ('{"prompt": 3, "answer": "1"}', "prompt is 3"),
        ('{"prompt": "", "answer": "1"}', "prompt is ''"),
        ('{"prompt": [], "answer": "1"}', r"prompt is \[\]"),
        ('{"prompt": ["hello"], "answer": "1"}', "neither text nor a list of chat messages"),
        ('{"prompt": "1", "answer": null}', "answer is None"),
        ('{"prompt": "1", "answer": true}', "answer is True"),
        ('{"prompt": "1", "answer": NaN}', "answer is NaN"),
        ('{"prompt": "1", "answer": Infinity}', "answer is Infinity"),
        ('{"prompt": "1", "answer": -1e400}', "answer is -Infinity"),
        ('{"prompt": "1", "answer": ""}', "answer is empty"),
        ('{"prompt": "1", "answer": " \\n"}', "answer is empty"),
        ('{"prompt": "1", "answer": "2", "answer": "3"}', "the key 'answer' appears twice"),
        ('{"prompt": "1\\ud83d", "answer": "2"}', "half a character"),
        ('{"prompt": [{"role": 3, "content": "1"}], "answer": "2"}', "neither text nor a list of chat"),
        ('{"prompt": "1", "answer": "2", "completions": 1}', "a column is called completions"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(
    tmp_path: Path, tokenizer: Tokenizer, line: str, said: str
) -> None:
    source = write(tmp_path, '{"prompt": "1+1=", "answer": "2"}', line)
    with pytest.raises(DataError, match=rf"problems\.jsonl:2: .*{said}"):
        load_dataset(source, tokenizer, 10)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b'{"prompt": "1", "answer": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"problems\.jsonl:1: not JSON"):
        load_dataset(str(path), tokenizer, 10)


def test_prompts_that_are_too_long_are_listed_with_the_key_to_raise(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = ['{"prompt": "1+1=", "answer": "2"}'] + ['{"prompt": "1+1+1+1=", "answer": "4"}'] * 7
    with pytest.raises(DataError) as caught:
        load_dataset(write(tmp_path, *lines), tokenizer, 5)
    assert "7 of 8 prompts are longer than 5 tokens" in caught.value.message
    assert "problems.jsonl:2 (8 tokens)" in caught.value.message
    assert "and 2 more" in caught.value.message
    assert caught.value.hint is not None
    assert "generate_config.max_prompt_length to 8" in caught.value.hint


def test_an_empty_answer_is_no_fault_where_other_columns_judge(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"prompt": "1", "answer": "", "target": 3}\n')
    [prompt] = load_dataset(str(source), tokenizer, 10, answers_judge=False)
    assert (prompt.answer, prompt.columns) == ("", {"target": 3})


def test_an_empty_dataset_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="holds no problems"):
        load_dataset(write(tmp_path, "", "  "), tokenizer, 10)


@pytest.mark.parametrize(("name", "said"), [("none.jsonl", "No such file"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, tokenizer: Tokenizer, name: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        load_dataset(str(tmp_path / name), tokenizer, 10)


def test_a_mindrecord_file_is_answered_with_what_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="JSON Lines"):
        load_dataset(str(tmp_path / "train.mindrecord"), tokenizer, 10)


@pytest.mark.skipif(WITH_GYM, reason="the extra `gym` is installed")
def test_without_the_extra_a_gym_dataset_says_how_to_get_it(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"rollforward\[gym\]"):
        load_dataset("reasoning_gym:chain_sum", tokenizer, 10)


@pytest.mark.skipif(not WITH_GYM, reason="the extra `gym` is not installed")
def test_a_gym_dataset_is_the_same_each_time(tokenizer: Tokenizer) -> None:
    source = "reasoning_gym:chain_sum?size=5&min_terms=2&max_terms=2"
    problems = load_dataset(source, tokenizer, 200)
    assert problems == load_dataset(source, tokenizer, 200)
    assert len(problems) == 5
    assert problems[0].columns["metadata"]["source_dataset"] == "chain_sum"
    assert problems != load_dataset(source + "&seed=1", tokenizer, 200)


@pytest.mark.skipif(not WITH_GYM, reason="the extra `gym` is not installed")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("reasoning_gym:chain_sums", "did you mean chain_sum"),
        ("reasoning_gym:chain_sum?sise=3", "unexpected keyword argument 'sise'"),
        ("reasoning_gym:chain_sum?min_terms=5&max_terms=2", "max_terms"),
    ],
)
def test_a_gym_dataset_that_cannot_be_made_says_why(tokenizer: Tokenizer, source: str, said: str) -> None:
    with pytest.raises(DataError, match=f"(?s){said}"):
        load_dataset(source, tokenizer, 10)
