"""`reasoning_gym_score`: the score that the reasoning-gym package gives for its own problems.

Each of its datasets scores in its own way, often with partial credit between 0 and 1. The
dataset is named by the problem's `metadata` column (`metadata["source_dataset"]`), which the
loader of `reasoning_gym:` datasets fills and which its JSON Lines exports have too.

The package is an extra: `pip install 'rollforward[gym]'` compiles one of its dependencies.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rollforward.errors import ConfigError
from rollforward.verifiers.extraction import find_answer


def reasoning_gym_score(
    *, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
) -> list[float]:
    """The dataset's own score of each completion: of the marked answer, otherwise of the whole text.

    An answer that was cut off (`verifiers.extraction`) scores 0.
    """
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
    for prompt, text, question, expected, about in zip(
        prompts, completions, questions, answer, metadata, strict=True
    ):
        name = about.get("source_dataset") if isinstance(about, Mapping) else None
        if not isinstance(name, str):
            raise ValueError("the problem's `metadata` column does not name its `source_dataset`")
        entry = {"question": question, "answer": expected, "metadata": about}
        found = find_answer(text, prompt)
        unfinished = found.kind == "unfinished"
        scores.append(0.0 if unfinished else float(get_score_answer_fn(name)(answer=found.text, entry=entry)))
    return scores
