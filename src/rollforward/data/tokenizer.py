"""A model's tokenizer, read from a Hugging Face folder without `transformers`.

Read are `tokenizer.json` (required), `tokenizer_config.json`, `special_tokens_map.json`,
`generation_config.json`, and the chat template (`chat_template.jinja`, or the entry of that
name in `tokenizer_config.json`). Where they name a token differently, the first of
`tokenizer_config.json`, `special_tokens_map.json` counts.

Left out: tokenizers that have no `tokenizer.json` (SentencePiece models alone, Python code), and
the function `strftime_now` that some templates ask for when it is there: the prompt of a problem
must not depend on the day.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from rollforward.errors import DataError

Message = Mapping[str, Any]
"""One turn of a chat: `role` and `content`, and whatever else the template knows."""


class Tokenizer:
    """Text to token ids and back, and chats to text."""

    def __init__(self, folder: Path) -> None:
        """Read the folder; DataError when a file is missing or cannot be read."""
        self.folder = folder
        self._fast = _read_fast(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = _read_json(folder / "special_tokens_map.json")
        generation = _read_json(folder / "generation_config.json")
        self._tokens = {
            name: token
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (token := _token_text(config.get(name)) or _token_text(special.get(name))) is not None
        }
        self._template = _chat_template(folder, config)
        self.eos_token_ids: tuple[int, ...] = self._find_eos(generation)
        """What ends a completion: the ids in `generation_config.json` and the `eos_token`, ascending."""
        self.pad_token_id: int = self._find_pad(generation)
        """Fills up rows; the first end token where the folder names no pad token."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self._fast.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` can be used."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, with what the tokenizer itself puts around it (a first token, perhaps)."""
        return self._fast.encode(text).ids

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of text that `render` made: the template has put in all special tokens already."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens left out."""
        return self._fast.decode(list(ids), skip_special_tokens=True)

    def render(self, messages: Sequence[Message]) -> str:
        """A chat as the text that the model is shown, ending where its own turn begins.

        Raises DataError when the folder has no chat template, or the template refuses the chat.
        """
        if self._template is None:
            raise DataError(
                f"{self.folder} has no chat template, so a prompt of chat messages cannot be rendered",
                hint="use prompts that are plain text, or put chat_template.jinja into the folder",
            )
        try:
            return self._compiled.render(messages=list(messages), add_generation_prompt=True, **self._tokens)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"the chat template of {self.folder} failed: {error}",
                hint="each message needs the fields that the template asks for, usually role and content",
            ) from error

    def check_fits(self, model_vocab_size: int) -> None:
        """DataError when this tokenizer can make ids that the model has no embedding for."""
        if self.vocab_size > model_vocab_size:
            raise DataError(
                f"the tokenizer in {self.folder} has ids up to {self.vocab_size - 1}, "
                f"but the model's vocab_size is {model_vocab_size}, so its ids end at {model_vocab_size - 1}",
                hint="tokenizer and model belong to different models; set rl_config.tokenizer_dir "
                "to the folder that the model came with",
            )

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        assert self._template is not None
        return environment.from_string(self._template)

    def _id(self, token: str, source: str) -> int:
        found = self._fast.token_to_id(token)
        if found is None:
            raise DataError(
                f"{self.folder}: {source} is {token!r}, which tokenizer.json does not have",
                hint="the files of the folder belong to different tokenizers; take them from one model",
            )
        return found

    def _find_eos(self, generation: Mapping[str, Any]) -> tuple[int, ...]:
        ids = _token_ids(self.folder, generation, "eos_token_id")
        if "eos_token" in self._tokens:
            ids.add(self._id(self._tokens["eos_token"], "eos_token"))
        if not ids:
            raise DataError(
                f"{self.folder} does not say which token ends a completion",
                hint="name eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
            )
        return tuple(sorted(ids))

    def _find_pad(self, generation: Mapping[str, Any]) -> int:
        if "pad_token" in self._tokens:
            return self._id(self._tokens["pad_token"], "pad_token")
        return min(_token_ids(self.folder, generation, "pad_token_id"), default=self.eos_token_ids[0])


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's own words for training; here it is plain."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's body, as if the tags were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _read_fast(folder: Path) -> FastTokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        there = (
            ", ".join(sorted(entry.name for entry in folder.iterdir()))
            if folder.is_dir()
            else "no such folder"
        )
        raise DataError(
            f"no tokenizer.json in {folder} (there: {there or 'nothing'})",
            hint="rl_config.tokenizer_dir (--tokenizer_dir) names a Hugging Face folder with tokenizer.json",
        )
    try:
        return FastTokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"{path} is no tokenizer: {error}", hint="download the file again") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", hint="download the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, not an object", hint="download the file again")
    return value


def _token_text(value: Any) -> str | None:
    """A token is written as text, or as an object with its text under `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _token_ids(folder: Path, generation: Mapping[str, Any], key: str) -> set[int]:
    value = generation.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise DataError(
            f"{folder / 'generation_config.json'}: {key} is {value!r}, not an id or a list of ids",
            hint="ids are whole numbers from 0",
        )
    return set(ids)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes HTML characters, which would change what the model reads.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
