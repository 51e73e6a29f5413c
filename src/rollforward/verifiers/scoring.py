"""Calls verifiers on samples and accepts only one finite number for each."""

import math
from collections.abc import Sequence
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np

from rollforward.errors import NonFinite, RollforwardError, VerifierError
from rollforward.grpo.ports import Verifier
from rollforward.grpo.types import Floats, Prompt
from rollforward.verifiers import exits

_SHOWN = 5


def score(verifiers: Sequence[Verifier], prompts: Sequence[Prompt], completions: Sequence[str]) -> Floats:
    """Rewards float32 [B, number of verifiers], unweighted, of B completions, each with its prompt.

    A verifier is called once, with `prompts`, `completions`, `answer` and every other column of
    the dataset as lists of length B (None where a line of the dataset lacks the column).

    Raises VerifierError, naming the verifier and the sample, when one raises (`exit()` included: see
    `verifiers.exits`) or returns anything but B numbers, and NonFinite, naming the samples, when a
    reward is NaN or infinite.
    """
    rewards = np.empty((len(completions), len(verifiers)), dtype=np.float32)
    for index, verifier in enumerate(verifiers):
        rewards[:, index] = _rewards_of(verifier, prompts, completions)
    return rewards


def _rewards_of(verifier: Verifier, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    rewards = _returned_by(verifier, prompts, completions)
    if len(rewards) != len(completions):
        count = f"{'at least ' * (len(rewards) > len(completions))}{len(rewards)}"
        raise VerifierError(
            f"verifier {verifier.name} returned {count} rewards for {len(completions)} completions "
            f"({_samples(prompts, completions, range(len(completions)))})"
        )
    # NumPy's booleans are numbers to anyone who writes `answers == expected`, but not to numbers.Real.
    wrong = [index for index, reward in enumerate(rewards) if not isinstance(reward, Real | np.bool_)]
    if wrong:
        raise VerifierError(
            f"verifier {verifier.name} returned {_described(rewards[wrong[0]])}, which is not a number, for "
            + _samples(prompts, completions, wrong)
        )
    values = [_as_float(reward) for reward in rewards]
    bad = [index for index, value in enumerate(values) if not math.isfinite(value)]
    if bad:
        raise NonFinite(
            f"verifier {verifier.name} gave a reward of {shown(rewards[bad[0]])} to "
            + _samples(prompts, completions, bad),
            hint="a reward must be a finite number; fix the verifier and resume with --resume_training: "
            "the same completions are generated again",
            samples=bad,
            facts={"verifier": verifier.name},
            arrays={"rewards": np.array(values, dtype=np.float32)},
        )
    return values


def _returned_by(verifier: Verifier, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Any]:
    """What the verifier returns, as a list: at most one reward too many, if it keeps returning."""
    with exits.kept_alive() as watch:
        try:
            returned: Any = _call(verifier, prompts, completions)
            # A generator is the verifier's code too, and runs only here.
            rewards = _taken(returned, len(completions) + 1)
        except RollforwardError:
            raise
        except BaseException as error:  # a reward function is third-party code
            if watch.passes(error):
                raise
            said = exits.described(error)
            where = _who_raises(verifier, prompts, completions, type(error), watch)
            raise VerifierError(
                f"verifier {verifier.name} {said}\n{where}",
                hint="call it on that sample to see why; nothing of this chunk was kept",
            ) from error
    if rewards is None:
        raise VerifierError(
            f"verifier {verifier.name} returned {_described(returned)}; "
            f"it must return a list of {len(completions)} numbers, one for each completion"
        )
    return rewards


def _taken(returned: Any, most: int) -> list[Any] | None:
    """Its first items; None for what has none to give, as a number."""
    try:
        items = iter(returned)
    except TypeError:
        return None
    return list(islice(items, most))


def _as_float(reward: Any) -> float:
    try:
        with np.errstate(over="ignore"):  # too large for what is stored becomes infinite, and is refused
            return float(np.float32(reward))
    except OverflowError:  # an int with more digits than a float has room for
        return math.inf


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
    verifier: Verifier,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    kind: type[BaseException],
    watch: exits.Watch,
) -> str:
    """Find the sample by calling the verifier on one at a time."""
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        try:
            _taken(_call(verifier, [prompt], [completion]), 2)
        except BaseException as error:
            if watch.passes(error):
                raise
            if isinstance(error, kind):
                return "on " + _samples(prompts, completions, [index])
            continue  # another error, perhaps about being called on one sample
    return "on no sample alone, only on all together: " + _samples(prompts, completions, range(len(prompts)))


def _samples(prompts: Sequence[Prompt], completions: Sequence[str], indices: Sequence[int]) -> str:
    lines = []
    for index in indices[:_SHOWN]:
        prompt, completion = prompts[index], completions[index]
        lines.append(f"sample {index} (prompt {prompt.index}: {shown(prompt.text)} -> {shown(completion)})")
    rest = len(indices) - len(lines)
    return ", ".join(lines) + (f" and {rest} more" if rest else "")


def _described(value: Any) -> str:
    return "None" if value is None else f"{shown(value)} (of type {type(value).__name__})"


def shown(value: Any, *, tail: bool = False) -> str:
    """What a value looks like, in 80 characters; `tail` shows more of its end, where answers are."""
    try:
        text = repr(value)
    except Exception:  # what a verifier returns may not even have a repr
        text = "what cannot be shown"
    if len(text) <= 80:
        return text
    return text[:15] + "..." + text[-60:] if tail else text[:60] + "..." + text[-15:]
