"""`reasoning_gym_score`: the score that the reasoning-gym package gives for its own problems.

Each of its datasets scores in its own way, often with partial credit between 0 and 1. The
dataset is named by the problem's `metadata` column (`metadata["source_dataset"]`), which the
loader of `reasoning_gym:` datasets fills and which its JSON Lines exports have too.

The package is an extra: `pip install 'rollforward[gym]'` compiles one of its dependencies.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rollforward.errors import ConfigError
from rollforward.verifiers.extraction import marked_answer


def reasoning_gym_score(
    *, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """The dataset's own score of each completion; what it marks as its answer is scored, else all of it."""
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as error:
        raise ConfigError(
            f"reasoning_gym_score needs the package reasoning-gym, which cannot be imported: {error}",
            hint="pip install 'rollforward[gym]' (it needs a C compiler)",
        ) from error
    questions = columns.get("question", prompts)
    metadata = columns.get("metadata", [None] * len(prompts))
    scores = []
    for text, question, expected, about in zip(completions, questions, answer, metadata, strict=True):
        name = about.get("source_dataset") if isinstance(about, Mapping) else None
        if not isinstance(name, str):
            raise ValueError("the problem's `metadata` column does not name its `source_dataset`")
        entry = {"question": question, "answer": expected, "metadata": about}
        marked = marked_answer(text)
        given = text.strip() if marked is None else marked
        scores.append(float(get_score_answer_fn(name)(answer=given, entry=entry)))
    return scores
