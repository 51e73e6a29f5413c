"""The files of a tokenizer's folder, read as transformers 5 reads them.

`tokenizer.json` holds the tokenizer; its truncation and padding are meant for batches, and are ignored.
`tokenizer_config.json` names the special tokens and may add tokens or change their flags
(`added_tokens_decoder`). Without that key, `special_tokens_map.json` is read too, and its names win.
Decoding leaves out every named special token, whatever `tokenizer.json` says. `add_bos_token` and
`add_eos_token` have no effect when there is a `tokenizer.json`: its post-processor decides.

Templates come from `chat_template.jinja` (called `default`) and `additional_chat_templates/*.jinja`; only if
there are none of these, from `chat_template` in `tokenizer_config.json`, which may be one text or several by
name.

Left out: `added_tokens.json`, which repeats `tokenizer.json` where that exists, and what model classes of
transformers rebuild (`LlamaTokenizer`, `Qwen2Tokenizer`): like its `PreTrainedTokenizerFast`, this takes
the file as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from rollforward.errors import DataError
from rollforward.inputs import LFS_HINT, is_lfs_pointer, is_there, parse_json, read_input

TOKENIZER_BYTES = 1 << 28
JSON_BYTES = 1 << 25
TEMPLATE_BYTES = 1 << 22

_GENERATION = "generation_config.json"
_MAIN_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFolder:
    """What the files say."""

    fast: FastTokenizer
    tokens: Mapping[str, str]
    """Special tokens by name (`bos_token` etc.), including the model's own (`image_token`)."""
    cleans_up: bool
    """Whether decoding removes spaces before punctuation (`clean_up_tokenization_spaces`)."""
    templates: Mapping[str, str]
    """Chat templates by name."""
    generation: Mapping[str, Any] | None
    """`generation_config.json`; None where there is no such file."""


@dataclass(frozen=True)
class _Files:
    """The files of a folder by name: from disk, or as a run carries them."""

    folder: Path
    carried: Mapping[str, bytes] | None

    def has(self, name: str) -> bool:
        return is_there(self.folder / name) if self.carried is None else name in self.carried

    def read(self, name: str, most: int) -> bytes:
        """The content, up to a maximum number of bytes; DataError otherwise."""
        path = self.folder / name
        try:
            content = read_input(path, most) if self.carried is None else self.carried[name]
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}", hint="check the model's folder"
            ) from error
        if len(content) > most:
            raise DataError(f"cannot read {path}: more than {most:,} bytes", hint="check the model's folder")
        if is_lfs_pointer(content):
            raise DataError(f"{path} is a pointer of Git LFS, not the file itself", hint=LFS_HINT)
        return content


def read_folder(folder: Path, carried: Mapping[str, bytes] | None = None) -> TokenizerFolder:
    """Read all of it; DataError names the file that is missing, damaged or something else.

    `carried`: the files of the folder, name -> content, as a run has them; the folder is then not read.
    """
    files = _Files(folder, carried)
    fast = _read_fast(files)
    if getattr(fast.model, "dropout", None):
        raise DataError(
            f"{folder / 'tokenizer.json'} has a dropout of {fast.model.dropout:g}, which gives a text other "
            "tokens each time, so a resumed run would see other prompts",
            hint="set dropout to null in its model section",
        )
    padding = fast.padding
    fast.no_truncation()
    fast.no_padding()
    config = _read_object(files, "tokenizer_config.json")
    listed = {"pad_token": padding["pad_token"]} if padding else {}
    listed |= config
    if "added_tokens_decoder" not in config:
        listed |= _read_object(files, "special_tokens_map.json")
    try:
        tokens = _special_tokens(listed)
        _add_tokens(fast, config.get("added_tokens_decoder") or {}, tokens, _extra(listed))
        fast.encode_special_tokens = config.get("split_special_tokens") is True
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder / 'tokenizer_config.json'}: its special tokens cannot be used: {error}",
            hint="a token is its text, or an object with `content` and flags; download the file again",
        ) from error
    return TokenizerFolder(
        fast=fast,
        tokens={name: str(token) for name, token in tokens.items()},
        cleans_up=_cleans_up(fast, config),
        templates=_templates(files, config),
        generation=_read_object(files, _GENERATION) if files.has(_GENERATION) else None,
    )


def _read_fast(files: _Files) -> FastTokenizer:
    path = files.folder / "tokenizer.json"
    if not files.has("tokenizer.json"):
        raise DataError(
            f"no tokenizer.json in {files.folder} (there: {_listing(files.folder)})",
            hint="rl_config.tokenizer_dir (--tokenizer_dir) names a Hugging Face folder with tokenizer.json",
        )
    content = files.read("tokenizer.json", TOKENIZER_BYTES)
    try:
        return FastTokenizer.from_str(content.decode("utf-8"))
    except BaseException as error:  # the package raises plain Exception, and BaseException where it panics
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        said = " ".join(str(error).split())[:300]
        raise DataError(f"{path} is not a tokenizer: {said}", hint="download the file again") from error


def _listing(folder: Path) -> str:
    try:
        return ", ".join(sorted(entry.name for entry in folder.iterdir())[:20]) or "nothing"
    except FileNotFoundError:
        return "no such folder"
    except OSError as error:
        return error.strerror or str(error)


def _read_object(files: _Files, name: str) -> Mapping[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not files.has(name):
        return {}
    path = files.folder / name
    try:
        value = parse_json(files.read(name, JSON_BYTES))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", hint="download the file again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, not an object", hint="download the file again")
    return value


def _special_tokens(listed: Mapping[str, Any]) -> dict[str, str | AddedToken]:
    """Special tokens by name, as they are written."""
    found: dict[str, str | AddedToken] = {}
    own = [name for name in listed if name.endswith("_token") and name not in NAMED]
    extra = listed.get("extra_special_tokens")
    named = {name: listed[name] for name in (*NAMED, *own) if name in listed}
    for name, value in (named | (extra if isinstance(extra, dict) else {})).items():
        token = _token(value)
        if token is not None:
            found[name] = token
    return found


def _extra(listed: Mapping[str, Any]) -> list[str | AddedToken]:
    """Special tokens without a name."""
    value = listed.get("extra_special_tokens") or listed.get("additional_special_tokens") or []
    tokens = [_token(item) for item in value] if isinstance(value, list) else []
    return [token for token in tokens if token is not None]


def _token(value: Any) -> str | AddedToken | None:
    """A token is written as its text, or as an object with its text under `content`; None: not a token."""
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return _flagged({**value, "special": True})
    return value if isinstance(value, str) else None


def _add_tokens(
    fast: FastTokenizer,
    decoder: Mapping[str, Any],
    named: Mapping[str, str | AddedToken],
    extra: Sequence[str | AddedToken],
) -> None:
    """Tokens of the configuration that `tokenizer.json` lacks or flags otherwise, in transformers' order."""
    present = fast.get_added_tokens_decoder().values()
    known = {repr(token) for token in present}
    listed = {int(index): _flagged(value) for index, value in decoder.items()}
    added = [token for _, token in sorted(listed.items(), key=itemgetter(0)) if repr(token) not in known]
    texts = {token.content for token in (*present, *listed.values())}
    for token in (*named.values(), *extra):
        if str(token) not in texts and fast.token_to_id(str(token)) is not None:
            texts.add(str(token))
            added.append(AddedToken(token, special=True) if isinstance(token, str) else token)
    names = {str(token) for token in named.values()}
    for token in added:
        token.special = token.special or token.content in names
    fast.add_tokens(added)
    for index, token in listed.items():
        if fast.token_to_id(token.content) != index:
            raise ValueError(
                f"added_tokens_decoder gives {token.content!r} the id {index}, "
                f"tokenizer.json {fast.token_to_id(token.content)}"
            )


def _flagged(value: Mapping[str, Any]) -> AddedToken:
    return AddedToken(**{key: value[key] for key in ("content", "special", *_FLAGS) if key in value})


def _cleans_up(fast: FastTokenizer, config: Mapping[str, Any]) -> bool:
    if config.get("clean_up_tokenization_spaces") is not True:
        return False
    # transformers does not do so for BPE, where it would remove spaces that are really in the text.
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output") is True
    return forced or type(fast.model).__name__ != "BPE"


def _templates(files: _Files, config: Mapping[str, Any]) -> Mapping[str, str]:
    named = {"default": _MAIN_TEMPLATE} if files.has(_MAIN_TEMPLATE) else {}
    more = files.folder / _MORE_TEMPLATES
    if files.carried is None and more.is_dir():
        named |= {
            path.name.removesuffix(".jinja"): f"{_MORE_TEMPLATES}/{path.name}"
            for path in sorted(more.glob("*.jinja"))
        }
    if named:
        return {name: _template_text(files, path) for name, path in named.items()}
    given = config.get("chat_template")
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    if isinstance(given, str):
        given = {"default": given}
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(
        isinstance(name, str) and isinstance(text, str) for name, text in given.items()
    ):
        raise DataError(
            f"{files.folder / 'tokenizer_config.json'}: chat_template is neither a text nor texts by name",
            hint="download the file again",
        )
    return given


def _template_text(files: _Files, name: str) -> str:
    path = files.folder / name
    try:
        return files.read(name, TEMPLATE_BYTES).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}", hint="save it as UTF-8") from None
