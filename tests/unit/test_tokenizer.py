"""What a tokenizer folder must hold, and that text, ids and chats come out as `transformers` has them."""

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folder import VOCAB, write_tokenizer

from rollforward.data.tokenizer import Tokenizer
from rollforward.errors import DataError

CHAT = (
    "{% for m in messages %}\n"
    "    {% generation %}{{ bos_token }}{{ m.role[0] }}:{{ m.content }}{% endgeneration %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}m:{% endif %}"
)


USER = [{"role": "user", "content": "1+1="}]


def test_text_comes_back_and_special_tokens_do_not(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    ids = tokenizer.encode("12+7=")
    assert [VOCAB[token] for token in ids] == list("12+7=")
    assert tokenizer.decode([*ids, *tokenizer.eos_token_ids, tokenizer.pad_token_id]) == "12+7="


def test_a_rendered_chat_gets_no_second_first_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, adds_first_token=True, chat_template=CHAT))
    assert tokenizer.encode("1")[0] == VOCAB.index("<s>")
    text = tokenizer.render([{"role": "user", "content": "1+1="}])
    assert text == "<s>u:1+1=m:"
    assert tokenizer.encode_rendered(text).count(VOCAB.index("<s>")) == 1


def test_a_template_file_comes_before_the_one_in_the_config(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, chat_template="{{ 1 }}")
    (folder / "chat_template.jinja").write_text("{{ messages | tojson }}")
    assert Tokenizer(folder).render([{"role": "<é>"}]) == '[{"role": "<é>"}]'


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": "{{ 2 }}"}]
    assert Tokenizer(write_tokenizer(tmp_path, chat_template=templates)).render(USER) == "2"


def test_what_a_template_objects_to_is_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer(
        write_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    )
    with pytest.raises(DataError, match="roles must alternate"):
        tokenizer.render([{"role": "user", "content": "1"}])


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1] }}",
    ],
)
def test_a_broken_or_hostile_template_is_an_error_of_ours(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(DataError, match="chat template"):
        tokenizer.render([{"role": "user", "content": "1"}])


def test_a_template_is_told_the_date_of_the_run_and_not_of_the_day(tmp_path: Path) -> None:
    """A prompt must not change between a start and its resume on another day, nor within a day."""
    folder = write_tokenizer(tmp_path, chat_template="{{ strftime_now('%d %b %Y, %H:%M') }}")
    tokenizer = Tokenizer(folder, today=datetime.date(2026, 7, 4))
    assert not tokenizer.dated
    assert tokenizer.render(USER) == "04 Jul 2026, 00:00"
    assert tokenizer.dated
    assert Tokenizer(folder).today == datetime.date.today()


def test_a_template_that_can_ask_for_the_date_and_does_not_is_not_dated(tmp_path: Path) -> None:
    template = (
        "{% if messages | length > 9 and strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}1"
    )
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=template))
    assert tokenizer.render(USER) == "1"
    assert not tokenizer.dated


def test_without_a_template_a_chat_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(DataError, match="no chat template"):
        tokenizer.render([{"role": "user", "content": "1"}])


@pytest.mark.parametrize(
    ("generation", "ends"),
    [
        ({}, (3,)),
        ({"eos_token_id": 4}, (3, 4)),
        ({"eos_token_id": [4, 3]}, (3, 4)),
        ({"eos_token_id": None}, (3,)),
    ],
)
def test_every_named_end_token_ends(
    tmp_path: Path, generation: dict[str, Any], ends: tuple[int, ...]
) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert Tokenizer(folder).eos_token_ids == ends


def test_special_tokens_are_found_in_their_map_too(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}}')
    tokenizer = Tokenizer(folder)
    assert tokenizer.eos_token_ids == (4,)
    assert tokenizer.pad_token_id == 4


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    tokenizer.check_fits(len(VOCAB))
    tokenizer.check_fits(len(VOCAB) + 100)
    with pytest.raises(
        DataError, match=f"ids up to {len(VOCAB) - 1}, but the model's vocab_size is {len(VOCAB) - 1}"
    ):
        tokenizer.check_fits(len(VOCAB) - 1)


def test_a_missing_folder_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json .*no such folder"):
        Tokenizer(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DataError, match=r"no tokenizer\.json .*there: model\.safetensors"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "not an object"),
        ("tokenizer_config.json", '{"eos_token": "<eos>"}', "'<eos>', which tokenizer.json does not have"),
        ("tokenizer_config.json", "{}", "does not say which token ends"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "not an id"),
        ("generation_config.json", '{"eos_token_id": [true]}', "not an id"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=said):
        Tokenizer(folder)
