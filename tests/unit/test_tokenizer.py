"""What a tokenizer folder must hold, and that text, ids and chats come out as `transformers` has them."""

import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folder import VOCAB, write_tokenizer

from rollforward.data import rendering
from rollforward.data.tokenizer import ChatError, Tokenizer
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


def with_tokenizer_json(folder: Path, **changes: Any) -> Path:
    path = write_tokenizer(folder) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 12},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


@pytest.mark.parametrize("change", [{"truncation": TRUNCATION}, {"padding": PADDING}])
def test_truncation_and_padding_of_the_file_are_not_for_prompts(tmp_path: Path, change: Any) -> None:
    """A run trained on prompts of two tokens, and nothing was said."""
    tokenizer = Tokenizer(with_tokenizer_json(tmp_path, **change))
    for encode in (tokenizer.encode, tokenizer.encode_rendered):
        assert encode("12+7=") == [VOCAB.index(character) for character in "12+7="]


def test_dropout_that_gives_other_tokens_each_time_is_refused(tmp_path: Path) -> None:
    """A resumed run would see other prompts than the run had."""
    folder = write_tokenizer(tmp_path)
    model = {"type": "BPE", "vocab": {token: index for index, token in enumerate(VOCAB)}, "merges": []}
    for dropout in (None, 0.0):
        Tokenizer(with_tokenizer_json(folder, model=model | {"dropout": dropout}))
    with pytest.raises(DataError, match="dropout"):
        Tokenizer(with_tokenizer_json(folder, model=model | {"dropout": 0.1}))


def test_a_text_that_has_the_first_token_gets_no_second_one(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, adds_first_token=True))
    first = VOCAB.index("<s>")
    assert tokenizer.encode("1") == tokenizer.encode("<s>1") == [first, VOCAB.index("1")]
    assert tokenizer.encode("<s><s>1").count(first) == 2


def test_a_turn_that_the_assistant_has_begun_is_continued(tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=template))
    begun = [*USER, {"role": "assistant", "content": "1"}]
    assert tokenizer.render(begun) == "<user>1+1=<end><assistant>1"
    assert tokenizer.render(USER) == "<user>1+1=<end><assistant>"
    with pytest.raises(DataError, match="no content to continue"):
        tokenizer.render([*USER, {"role": "assistant", "content": None}])


def test_a_template_that_drops_the_begun_turn_is_an_error(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(DataError, match=r"leaves .* that turn out"):
        tokenizer.render([*USER, {"role": "assistant", "content": "1"}])


def test_content_in_parts_is_joined_for_a_template_of_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template="{{ messages[0].content }}"))
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]
    assert tokenizer.render([{"role": "user", "content": parts}]) == "1+ 1="
    with pytest.raises(DataError, match="'image'"):
        tokenizer.render([{"role": "user", "content": [*parts, {"type": "image", "url": "x"}]}])


def test_named_templates_without_a_default_are_named(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "rag", "template": "{{ 2 }}"}]
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=templates))
    assert tokenizer.has_chat_template
    with pytest.raises(DataError, match="called rag, tool_use, and none called default"):
        tokenizer.render(USER)


def test_more_templates_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """As in transformers: files count instead of the configuration, even where none is the default."""
    folder = write_tokenizer(tmp_path, chat_template="{{ 1 }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ 2 }}")
    with pytest.raises(DataError, match="called rag, and none called default"):
        Tokenizer(folder).render(USER)
    (folder / "chat_template.jinja").write_text("{{ 3 }}")
    assert Tokenizer(folder).render(USER) == "3"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ '%0999999999d' % 7 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set a = ['x' * 1000000] %}{% for i in range(9999) %}{{ a[0] }}{% endfor %}",
        "{{ 'a' * 20000000 }}",
        "{{" + "(" * 5000 + ")" * 5000 + "}}",
        "{% for m in messages %}" * 200,
    ],
)
def test_a_template_that_takes_all_time_or_memory_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(rendering, "CPU_SECONDS", 1)
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(DataError, match="chat template"):
        tokenizer.render(USER)


def test_a_damaged_chat_is_named_by_its_number(tmp_path: Path) -> None:
    template = "{% if messages[0].content == 'x' %}{{ raise_exception('no') }}{% endif %}1"
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(ChatError) as caught:
        tokenizer.render_all([USER, USER, [{"role": "user", "content": "x"}], USER])
    assert caught.value.index == 2


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17210284\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pointer_of_git_lfs_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / name).write_text(LFS)
    with pytest.raises(DataError, match=f"{name} is a pointer of Git LFS") as caught:
        Tokenizer(folder)
    assert "git lfs pull" in str(caught.value.hint)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"],
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "huge", "dangling"])
def test_a_file_that_is_not_one_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    path = write_tokenizer(tmp_path) / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    else:
        path.symlink_to(path)
    with pytest.raises(DataError, match=name):
        Tokenizer(tmp_path)


ODD = ["[" * 50_000, '{"a":' * 50_000, "[1]", '"x"', "9" * 5000, "nan", '{"eos_token": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_odd_json_is_an_error_of_ours(tmp_path: Path, name: str, text: str) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=name):
        Tokenizer(folder)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"x": {"content": "<x>"}}},
        {"added_tokens_decoder": {"3": "</s>"}},
        {"added_tokens_decoder": {"3": {"content": 3}}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"7": {"content": "</s>", "special": True}}},
        {"chat_template": 3},
        {"chat_template": [{"name": "default"}]},
    ],
)
def test_a_configuration_that_makes_no_sense_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        Tokenizer(write_tokenizer(tmp_path, **config))


def test_without_a_generation_config_the_models_own_end_tokens_count(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    model = {"eos_token_id": [4], "vocab_size": 100}
    assert Tokenizer(folder, model_config=model).eos_token_ids == (3, 4)
    (folder / "generation_config.json").write_text("{}")
    assert Tokenizer(folder, model_config=model).eos_token_ids == (3,)


def test_what_cannot_be_encoded_is_an_error_of_ours(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    with pytest.raises(DataError, match="cannot encode"):
        tokenizer.encode("1\ud83d")


def test_a_template_cannot_write_a_token_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, bos_token="<begin>", chat_template="{{ bos_token }}1")
    with pytest.raises(DataError, match="writes <begin>"):
        Tokenizer(folder).render(USER)
