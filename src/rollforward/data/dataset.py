"""The problems of a run: a JSON Lines or Parquet file, or a dataset that the reasoning-gym package makes.

    data/train.jsonl                                       one object a line; may be gzipped
    reasoning_gym:chain_sum?size=500&seed=1&min_terms=2    a dataset's name and its parameters

A row has a `prompt`, which is text or a list of chat messages, and an `answer`, which is text
or a number and never empty; all other columns are passed to verifiers by name. A problem's index is its
position in the dataset, from 0; the order of an epoch permutes these. Everything is in memory.

Left out: MindRecord files, remote datasets, and datasets larger than memory.
"""

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import yaml

from rollforward.data.rows import LINE_HINT, Row, read_rows
from rollforward.data.tokenizer import ChatError, Tokenizer
from rollforward.errors import DataError
from rollforward.grpo.types import Prompt
from rollforward.inputs import open_input

GYM_PREFIX = "reasoning_gym:"

_SHOWN = 5
_DIGESTED = 1 << 30
"""Largest file, in bytes, that is digested rather than loaded again: a second or two."""
# Without a seed reasoning-gym draws its own, and a resumed run would see other problems.
_GYM_DEFAULTS = {"size": 500, "seed": 0}
# Verifiers get something else under these names.
_RESERVED = ("prompts", "completions")


@dataclass(frozen=True)
class _Problem:
    where: str
    """For messages: `file:line`."""
    prompt: str | Sequence[Mapping[str, Any]]
    answer: str
    columns: Mapping[str, Any]


def load_dataset(
    source: str, tokenizer: Tokenizer, max_prompt_length: int, *, answers_judge: bool = True
) -> list[Prompt]:
    """All problems of a dataset, tokenized, in order; `source` as in the configuration's `dataset_file`.

    Raises DataError for a file that is missing or malformed (naming `file:line`), an empty
    dataset, prompts longer than `max_prompt_length` tokens, and a missing or unknown gym. Also for an
    empty answer, unless `answers_judge` is false: verifiers that judge by other columns do not need
    answers.
    """
    if source.startswith(GYM_PREFIX):
        problems = _gym_problems(source, chat=tokenizer.has_chat_template)
    else:
        problems = [_problem(row, answers_judge=answers_judge) for row in _rows(Path(source))]
    if not problems:
        raise DataError(f"{source} holds no problems", hint="a problem is a line with `prompt` and `answer`")
    texts = _texts(problems, tokenizer)
    prompts = [
        _tokenized(index, problem, text, tokenizer)
        for index, (problem, text) in enumerate(zip(problems, texts, strict=True))
    ]
    _check_lengths(problems, prompts, max_prompt_length)
    return prompts


class RememberedDataset:
    """`load_dataset` for who loads it again and again: what has not changed is not read and tokenized anew.

    A file is known by the digest of all its bytes, not by its date.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._prompts: list[Prompt] = []

    def load(
        self,
        source: str,
        tokenizer: Tokenizer,
        max_prompt_length: int,
        *,
        files: Mapping[str, bytes],
        answers_judge: bool = True,
    ) -> list[Prompt]:
        """As `load_dataset`; `files` are what the tokenizer was made from."""
        key = source, _digest(source), dict(files), tokenizer.today, max_prompt_length, answers_judge
        if key != self._key:
            self._prompts = load_dataset(source, tokenizer, max_prompt_length, answers_judge=answers_judge)
            self._key = key
        return self._prompts


def _digest(source: str) -> object:
    """Of a file's bytes; something that equals nothing else for a file that is not digested.

    A file that cannot be read is one: loading it says why. A very large one is too.
    """
    if source.startswith(GYM_PREFIX):
        return ""  # its parameters say everything
    found = hashlib.sha256()
    try:
        with open_input(source) as file:
            if os.fstat(file.fileno()).st_size > _DIGESTED:
                return object()
            while part := file.read(1 << 20):
                found.update(part)
    except OSError:
        return object()
    return found.hexdigest()


def _rows(path: Path) -> Iterator[Row]:
    if path.suffix.startswith(".mindrecord"):
        raise DataError(
            f"{path} is a MindRecord file, which is not read here",
            hint="rl_config.dataset_file names a JSON Lines file with `prompt` and `answer` on each line",
        )
    return read_rows(path)


def _problem(row: Row, *, answers_judge: bool) -> _Problem:
    values = dict(row.values)
    missing = [key for key in ("prompt", "answer") if key not in values]
    if missing:
        raise DataError(
            f"{row.where}: no {' and no '.join(missing)}; it has {', '.join(values) or 'nothing'}",
            hint=LINE_HINT,
        )
    prompt, answer = values.pop("prompt"), values.pop("answer")
    reserved = [key for key in _RESERVED if key in values]
    if reserved:
        raise DataError(
            f"{row.where}: a column is called {reserved[0]}, a name under which verifiers get something else",
            hint="rename the column",
        )
    text = _checked_answer(row.where, answer)
    if answers_judge and not text.strip():
        raise DataError(f"{row.where}: answer is empty", hint="leave out problems that have no answer")
    return _Problem(row.where, _checked_prompt(row.where, prompt), text, values)


def _checked_prompt(where: str, prompt: Any) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str) and prompt:
        return prompt
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in prompt)
    ):
        return prompt
    raise DataError(
        f"{where}: prompt is {_cut(prompt)}, neither text nor a list of chat messages",
        hint='messages look like [{"role": "user", "content": "What is 1+2?"}]',
    )


def _checked_answer(where: str, answer: Any) -> str:
    hint = "write it as text"
    if isinstance(answer, str):
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        if isinstance(answer, int) or math.isfinite(answer):
            return json.dumps(answer)
        hint = "pandas writes a missing value as NaN: leave such problems out, or write the answer as text"
        raise DataError(f"{where}: answer is {json.dumps(answer)}, which nothing can equal", hint=hint)
    raise DataError(f"{where}: answer is {_cut(answer)}, neither text nor a number", hint=hint)


def _gym_problems(source: str, *, chat: bool) -> list[_Problem]:
    """Problems of reasoning-gym; for a model with a chat template, each question is the user's turn."""
    name, _, query = source.removeprefix(GYM_PREFIX).partition("?")
    try:
        parameters = _GYM_DEFAULTS | {key: yaml.safe_load(value) for key, value in parse_qsl(query)}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(
            f"{source[:200]}: a parameter cannot be read: {' '.join(str(error).split())[:200]}",
            hint="parameters are numbers, true, false or text: reasoning_gym:chain_sum?size=500&seed=1",
        ) from error
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise DataError(
            f"the dataset {source} needs the package reasoning-gym, which cannot be imported: {error}",
            hint="pip install 'rollforward[gym]' (it needs a C compiler)",
        ) from error
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.0)
        raise DataError(f"reasoning-gym has no dataset {name!r}", hint=f"did you mean {', '.join(nearest)}?")
    try:
        entries = list(create_dataset(name, **parameters))
    except Exception as error:  # each dataset checks its parameters in its own way
        raise DataError(
            f"reasoning-gym cannot make {source}: {type(error).__name__}: {error}",
            hint="parameters are those of the dataset's configuration class in reasoning-gym",
        ) from error
    problems = []
    for number, entry in enumerate(entries):
        question = entry["question"]
        prompt = [{"role": "user", "content": question}] if chat else question
        columns = {"question": question, "metadata": entry["metadata"]}
        problems.append(_Problem(f"{source} problem {number}", prompt, str(entry["answer"]), columns))
    return problems


def _texts(problems: Sequence[_Problem], tokenizer: Tokenizer) -> list[str]:
    """The text that the model sees, for each problem; all chats are rendered at once."""
    chats = [(problem.where, problem.prompt) for problem in problems if not isinstance(problem.prompt, str)]
    try:
        rendered = iter(tokenizer.render_all([chat for _, chat in chats]) if chats else [])
    except ChatError as error:
        raise DataError(f"{chats[error.index][0]}: {error.message}", hint=error.hint) from error
    return [problem.prompt if isinstance(problem.prompt, str) else next(rendered) for problem in problems]


def _tokenized(index: int, problem: _Problem, text: str, tokenizer: Tokenizer) -> Prompt:
    encode = tokenizer.encode if isinstance(problem.prompt, str) else tokenizer.encode_rendered
    try:
        ids = encode(text)
    except DataError as error:
        raise DataError(f"{problem.where}: {error.message}", hint=error.hint) from error
    if not ids:
        raise DataError(
            f"{problem.where}: the prompt {_cut(text)} has no tokens", hint="is this its tokenizer?"
        )
    return Prompt(
        index=index, text=text, token_ids=tuple(ids), answer=problem.answer, columns=dict(problem.columns)
    )


def _check_lengths(problems: Sequence[_Problem], prompts: Sequence[Prompt], limit: int) -> None:
    long = [prompt for prompt in prompts if len(prompt.token_ids) > limit]
    if long:
        shown = ", ".join(
            f"{problems[prompt.index].where} ({len(prompt.token_ids)} tokens)" for prompt in long[:_SHOWN]
        )
        rest = f" and {len(long) - _SHOWN} more" if len(long) > _SHOWN else ""
        longest = max(len(prompt.token_ids) for prompt in long)
        raise DataError(
            f"{len(long)} of {len(prompts)} prompts are longer than {limit} tokens: {shown}{rest}",
            hint=f"raise generate_config.max_prompt_length to {longest}, or leave these problems out",
        )


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
