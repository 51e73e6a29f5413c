"""What completions are worth: reward functions, one per file, and the registry that names them.

A reward function is called with keyword arguments: `prompts`, `completions` and `answer`, lists
of B strings, and every other column of the dataset as a list of length B. It returns B numbers.
A function that does not need all of them may take fewer, or collect the rest in `**columns`.

`resolve` turns the names of a configuration into verifiers, `score` calls them and checks what
they return, and `describe` says what their rewards depend on. Weights are applied by the trainer; the
journal keeps the unweighted rewards.
What counts as an answer, and when two are equal, is in `extraction`, `notation` and `accuracy`, and
with examples in docs/reference/rewards.md. A verifier can neither end the process (`exits`) nor, by what a
completion holds, take unbounded time (`exact`, `mathematics`).

Left out: learned reward models, and asynchronous or remote scoring.
"""

from rollforward.verifiers.registry import BUILT_IN, BY_ANSWER, resolve
from rollforward.verifiers.scoring import score
from rollforward.verifiers.sources import describe

__all__ = ["BUILT_IN", "BY_ANSWER", "describe", "resolve", "score"]
