"""A model's tokenizer, read from a Hugging Face folder without `transformers`.

Text becomes the ids that transformers and TRL give it. Plain text gets the tokens that the tokenizer adds
around it (such as a first token), once: a text that already begins or ends with that token gets no second
one. A chat is rendered by its template (`chats.py`), which writes all special tokens itself, so nothing is
added.

What ends a completion: `eos_token` and the ids in `generation_config.json`, or in the model's `config.json`
if there is no such file.

Trusted: a model's folder, like a program that you run. A template runs in a sandbox with limits on time and
memory (`rendering.py`); `tokenizer.json` is read by the package tokenizers, and its regular expressions run
without limits. Left out: tokenizers that have no `tokenizer.json` (SentencePiece models alone, Python code).
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding

from rollforward.data.folder import read_folder
from rollforward.data.rendering import ChatFailed, render_chats
from rollforward.errors import DataError

Message = Mapping[str, Any]
"""One turn of a chat: `role` and `content`, and whatever else the template knows."""


_MIXED_HINT = "the files of the folder belong to different tokenizers; take them from one model"


class ChatError(DataError):
    """A chat that cannot be rendered; `index` is its index among the given chats."""

    def __init__(self, message: str, *, hint: str, index: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.index = index


class Tokenizer:
    """Text to token ids and back, and chats to text."""

    def __init__(
        self,
        folder: Path,
        *,
        carried: Mapping[str, bytes] | None = None,
        model_config: Mapping[str, Any] | None = None,
        today: datetime.date | None = None,
    ) -> None:
        """Read the folder; DataError when a file is missing or cannot be read.

        `carried` are its files as a run has them, name -> content: nothing else in the folder is read.
        `model_config` is the model's `config.json`. `today` is the date that chat templates see; a
        resumed run passes the date of its first start, so that its prompts stay the same.
        """
        self.folder = folder
        read = read_folder(folder, carried)
        self._fast = read.fast
        self._tokens = read.tokens
        self._templates = read.templates
        self._cleans_up = read.cleans_up
        self._lacking = [text for text in read.tokens.values() if self._fast.token_to_id(text) is None]
        ids_from = read.generation if read.generation is not None else model_config or {}
        source = "config.json" if read.generation is None else "generation_config.json"
        self.today = today or datetime.date.today()
        self.dated = False
        """Whether any chat rendered so far asked for the date: then it belongs to the run's facts."""
        self.eos_token_ids: tuple[int, ...] = self._find_eos(ids_from, source)
        """What ends a completion, ascending."""
        self.pad_token_id: int = self._find_pad(ids_from, source)
        """Fills up rows; the end token if the folder names no pad token."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self._fast.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def has_chat_template(self) -> bool:
        """Whether chats can be rendered."""
        return bool(self._templates)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, with what the tokenizer adds around it unless it is already there."""
        whole, plain = self._encoding(text, special=True), self.encode_rendered(text)
        begin = next(
            (place for place, put in enumerate(whole.special_tokens_mask) if not put), len(whole.ids)
        )
        before, after = whole.ids[:begin], whole.ids[begin + len(plain) :]
        if whole.ids != [*before, *plain, *after]:
            return whole.ids  # a post-processor that does more than add
        doubled_first = before == plain[: len(before)]
        doubled_last = after == plain[len(plain) - len(after) :]
        return [*([] if doubled_first else before), *plain, *([] if doubled_last else after)]

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of text that `render` made: the template has already written all special tokens."""
        return self._encoding(text, special=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, special tokens left out."""
        text = self._fast.decode(list(ids), skip_special_tokens=True)
        return _cleaned_up(text) if self._cleans_up else text

    def render(self, messages: Sequence[Message]) -> str:
        """A chat as the text that the model sees; see `render_all`."""
        return self.render_all([messages])[0]

    def render_all(self, chats: Sequence[Sequence[Message]]) -> list[str]:
        """The text of each chat, ending where the model's own words begin.

        Raises ChatError when the folder has no template for them, or the template refuses one.
        """
        template = self._default_template()
        try:
            rendered = render_chats(template, self._tokens, chats, self.today)
        except ChatFailed as error:
            raise ChatError(
                f"the chat template of {self.folder} failed: {error.reason}",
                hint="each message needs the fields that the template asks for, usually role and content",
                index=error.index,
            ) from error
        for index, text in enumerate(rendered.texts):
            for token in self._lacking:
                if token in text:
                    raise ChatError(
                        f"{self.folder}: the chat template writes {token}, which tokenizer.json lacks",
                        hint=_MIXED_HINT,
                        index=index,
                    )
        self.dated = self.dated or rendered.dated
        return rendered.texts

    def check_fits(self, model_vocab_size: int) -> None:
        """DataError when this tokenizer can make ids that the model has no embedding for."""
        if self.vocab_size > model_vocab_size:
            raise DataError(
                f"the tokenizer in {self.folder} has ids up to {self.vocab_size - 1}, "
                f"but the model's vocab_size is {model_vocab_size}, so its ids end at {model_vocab_size - 1}",
                hint="tokenizer and model belong to different models; set rl_config.tokenizer_dir "
                "to the folder that the model came with",
            )

    def _encoding(self, text: str, *, special: bool) -> Encoding:
        try:
            return self._fast.encode(text, add_special_tokens=special)
        except (
            BaseException
        ) as error:  # the package raises plain Exception, and BaseException where it panics
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise DataError(
                f"the tokenizer in {self.folder} cannot encode {text[:60]!r}: {error}",
                hint="half a surrogate pair is not text; else the tokenizer may lack an unknown token",
            ) from error

    def _default_template(self) -> str:
        if "default" in self._templates:
            return self._templates["default"]
        if self._templates:
            raise ChatError(
                f"{self.folder} has chat templates called {', '.join(sorted(self._templates))}, and none "
                "called default, so a prompt of chat messages cannot be rendered",
                hint="put the one to be used into the folder as chat_template.jinja",
            )
        raise ChatError(
            f"{self.folder} has no chat template, so a prompt of chat messages cannot be rendered",
            hint="use prompts that are plain text, or put chat_template.jinja into the folder",
        )

    def _id(self, token: str, source: str) -> int:
        found = self._fast.token_to_id(token)
        if found is None:
            raise DataError(
                f"{self.folder}: {source} is {token!r}, which tokenizer.json does not have",
                hint=_MIXED_HINT,
            )
        return found

    def _find_eos(self, config: Mapping[str, Any], source: str) -> tuple[int, ...]:
        ids = _token_ids(self.folder / source, config, "eos_token_id")
        if "eos_token" in self._tokens:
            ids.add(self._id(self._tokens["eos_token"], "eos_token"))
        if not ids:
            raise DataError(
                f"{self.folder} does not say which token ends a completion",
                hint="name eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
            )
        return tuple(sorted(ids))

    def _find_pad(self, config: Mapping[str, Any], source: str) -> int:
        if "pad_token" in self._tokens:
            return self._id(self._tokens["pad_token"], "pad_token")
        return min(_token_ids(self.folder / source, config, "pad_token_id"), default=self.eos_token_ids[0])


def _token_ids(path: Path, config: Mapping[str, Any], key: str) -> set[int]:
    value = config.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and 0 <= item < 1 << 31 for item in ids):
        raise DataError(
            f"{path}: {key} is {str(value)[:60]}, not an id or a list of ids",
            hint="ids are whole numbers from 0",
        )
    return set(ids)


def _cleaned_up(text: str) -> str:
    """Without the spaces that word tokenizers leave before punctuation; transformers' list, in order."""
    for ending in (".", "?", "!", ","):
        text = text.replace(f" {ending}", ending)
    text = text.replace(" ' ", "'")
    for ending in ("n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(f" {ending}", ending)
    return text
