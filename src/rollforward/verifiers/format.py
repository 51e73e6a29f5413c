"""`format_reward`: 1 for a completion that thinks first and then answers, in the tags asked for."""

import re
from collections.abc import Sequence
from typing import Any

_FORMAT = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(
    *, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """1.0 where the completion is `<think>...</think><answer>...</answer>`, each tag once, else 0.0.

    Whitespace may stand around and between the two parts, and nothing else.
    """
    del prompts, answer, columns  # the form is a matter of the completion alone
    return [float(_has_format(text)) for text in completions]


def _has_format(text: str) -> bool:
    return all(text.count(tag) == 1 for tag in _TAGS) and _FORMAT.fullmatch(text) is not None
