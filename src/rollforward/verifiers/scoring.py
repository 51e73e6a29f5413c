"""Calls verifiers on samples and lets nothing through but one finite number for each."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from rollforward.errors import NonFinite, RollforwardError, VerifierError
from rollforward.grpo.ports import Verifier
from rollforward.grpo.types import Floats, Prompt

_SHOWN = 5


def score(verifiers: Sequence[Verifier], prompts: Sequence[Prompt], completions: Sequence[str]) -> Floats:
    """Rewards float32 [B, number of verifiers], unweighted, of B completions, each with its prompt.

    A verifier is called once, with `prompts`, `completions`, `answer` and every other column of
    the dataset as lists of length B (None where a line of the dataset lacks the column).

    Raises VerifierError, naming the verifier and the sample, when one raises or returns anything
    but B numbers, and NonFinite, naming the samples, when a reward is NaN or infinite.
    """
    rewards = np.empty((len(completions), len(verifiers)), dtype=np.float32)
    for index, verifier in enumerate(verifiers):
        rewards[:, index] = _rewards_of(verifier, prompts, completions)
    return rewards


def _rewards_of(verifier: Verifier, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    try:
        returned: Any = _call(verifier, prompts, completions)
    except RollforwardError:
        raise
    except Exception as error:  # a reward function is anybody's code
        where = _who_raises(verifier, prompts, completions, type(error))
        raise VerifierError(
            f"verifier {verifier.name} raised {type(error).__name__}: {error}\n{where}",
            hint="call it on that sample by hand; nothing of this chunk was kept",
        ) from error
    try:
        rewards = list(returned)
    except TypeError:
        raise VerifierError(
            f"verifier {verifier.name} returned {_described(returned)}; "
            f"it must return a list of {len(completions)} numbers, one for each completion"
        ) from None
    if len(rewards) != len(completions):
        raise VerifierError(
            f"verifier {verifier.name} returned {len(rewards)} rewards for {len(completions)} completions "
            f"({_samples(prompts, completions, range(len(completions)))})"
        )
    # NumPy's booleans are numbers to anyone who writes `answers == expected`, but not to numbers.Real.
    wrong = [index for index, reward in enumerate(rewards) if not isinstance(reward, Real | np.bool_)]
    if wrong:
        raise VerifierError(
            f"verifier {verifier.name} returned {_described(rewards[wrong[0]])}, which is no number, for "
            + _samples(prompts, completions, wrong)
        )
    with np.errstate(over="ignore"):  # too large for what is stored becomes infinite, and is refused below
        values = [float(np.float32(reward)) for reward in rewards]
    bad = [index for index, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise NonFinite(
            f"verifier {verifier.name} gave a reward of {rewards[bad[0]]} to "
            + _samples(prompts, completions, bad),
            hint="a reward must be a finite number; mend the verifier and resume with --resume_training: "
            "the same completions are generated again",
            samples=bad,
            facts={"verifier": verifier.name},
            arrays={"rewards": np.array(values, dtype=np.float32)},
        )
    return values


def _call(verifier: Verifier, prompts: Sequence[Prompt], completions: Sequence[str]) -> Any:
    names = sorted({name for prompt in prompts for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    return verifier(
        prompts=[prompt.text for prompt in prompts],
        completions=list(completions),
        answer=[prompt.answer for prompt in prompts],
        **columns,
    )


def _who_raises(
    verifier: Verifier, prompts: Sequence[Prompt], completions: Sequence[str], kind: type[Exception]
) -> str:
    """Find the sample by calling the verifier on one at a time."""
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            _call(verifier, [prompt], [completion])
        except kind:
            return "on " + _samples(prompts, completions, [index])
        except Exception:  # another complaint, about being called on one sample perhaps
            continue
    return "on no sample alone, only on all together: " + _samples(prompts, completions, range(len(prompts)))


def _samples(prompts: Sequence[Prompt], completions: Sequence[str], indices: Sequence[int]) -> str:
    shown = []
    for index in indices[:_SHOWN]:
        prompt, completion = prompts[index], completions[index]
        shown.append(f"sample {index} (prompt {prompt.index}: {_cut(prompt.text)} -> {_cut(completion)})")
    rest = len(indices) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _described(value: Any) -> str:
    return "None" if value is None else f"{_cut(value)} (of type {type(value).__name__})"


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-15:]
