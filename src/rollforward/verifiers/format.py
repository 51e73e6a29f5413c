"""`format_reward`: 1 for a completion that thinks first and then answers, in the required tags.

The templates of many reasoning models write the beginning of the answer themselves: those of
DeepSeek-R1's distillations and of thinking Qwen3 end the prompt with `<think>`, and Qwen3's, told
not to think, with `<think></think>`. The end of the prompt is then judged as well, since no
completion can contain it.
"""

import re
from collections.abc import Sequence
from typing import Any

_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_BEGUN = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


def format_reward(
    *, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """1.0 where the completion is `<think>...</think><answer>...</answer>`, each tag once, else 0.0.

    Only whitespace is allowed around and between the two parts. The prompt may end with
    the first of the tags, or the first two; the completion then has the rest.
    """
    del answer, columns  # the form is not a matter of the right answer
    return [float(_has_format(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def begun_by(prompt: str) -> str:
    """The `<think>`, or `<think></think>`, that the prompt ends with, for the completion to continue."""
    begun = _BEGUN.search(prompt[-200:])
    return begun.group() if begun else ""


def _has_format(prompt: str, completion: str) -> bool:
    begun = begun_by(prompt)
    return _is_format(completion) or (begun != "" and _is_format(begun + completion))


def _is_format(text: str) -> bool:
    return all(text.count(tag) == 1 for tag in _TAGS) and _FORMAT.fullmatch(text) is not None
