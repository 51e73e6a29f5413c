"""From the names in a configuration to verifiers.

A name is one of `BUILT_IN`, or `package.module:function` for a function of the user's own. That
module is imported as Python would import it with the working folder last on its path.
"""

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rollforward.errors import ConfigError
from rollforward.grpo.ports import Verifier
from rollforward.verifiers import exits
from rollforward.verifiers.accuracy import accuracy_reward
from rollforward.verifiers.format import format_reward
from rollforward.verifiers.reasoning_gym import reasoning_gym_score

RewardFunction = Callable[..., Sequence[float]]

BUILT_IN: Mapping[str, RewardFunction] = MappingProxyType(
    {
        "accuracy_reward": accuracy_reward,
        "format_reward": format_reward,
        "reasoning_gym_score": reasoning_gym_score,
    }
)

BY_ANSWER = frozenset({"accuracy_reward", "reasoning_gym_score"})
"""Those that compare with the `answer` column."""

_USERS = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)", re.ASCII)


@dataclass
class NamedFunction:
    """A reward function under the name that the configuration uses for it."""

    name: str
    function: RewardFunction

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
    ) -> Sequence[float]:
        """The function's rewards; it gets only the keyword arguments that it takes."""
        given = {"prompts": prompts, "completions": completions, "answer": answer, **columns}
        return self.function(**_accepted(self.function, given))


def resolve(names: Sequence[str]) -> list[Verifier]:
    """The verifiers of these names, in order.

    Raises ConfigError for no name, a name given twice, an unknown one (naming the nearest), and
    a user's function that cannot be imported or called.
    """
    if not names:
        raise ConfigError(
            "no verifier is named, so nothing would be rewarded",
            hint=f"set reward_config.verifier_function to one or more of {', '.join(BUILT_IN)}",
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"verifier {', '.join(twice)} is named more than once in reward_config.verifier_function",
            hint="name it once and raise its weight in reward_config.verifier_weight",
        )
    return [NamedFunction(name, BUILT_IN.get(name) or _users_function(name)) for name in names]


def _users_function(name: str) -> RewardFunction:
    match = _USERS.fullmatch(name)
    if match is None:
        nearest = difflib.get_close_matches(name, BUILT_IN, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"unknown verifier {name!r} in reward_config.verifier_function; there are {', '.join(BUILT_IN)}",
            hint=f"did you mean {nearest}? A function of your own is named package.module:function",
        )
    module_name, function_name = match.groups()
    module = _import(name, module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f"verifier {name!r}: {module.__file__ or module_name} has no function {function_name!r}",
            hint=f"it has {', '.join(public)}" if public else "define it there",
        )
    return function  # type: ignore[no-any-return]  # what it returns is checked at each call


def _import(name: str, module_name: str) -> Any:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that nothing in the working folder can shadow an installed module
    # Within it, so that `from os import _exit` at the top of the module is held too.
    with exits.kept_alive() as watch:
        try:
            return importlib.import_module(module_name)
        except BaseException as error:  # a user's module may raise anything, or call exit()
            if watch.passes(error):
                raise
            raise ConfigError(
                f"verifier {name!r}: importing {module_name} failed: it {exits.described(error)}",
                hint="modules are looked for in the working folder and on PYTHONPATH; this is "
                + f"{folder}. Does `python -c 'import {module_name}'` work there?",
            ) from error


def _accepted(function: RewardFunction, given: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that the function has a parameter for: all of them if it has `**columns`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin or extension function without a signature
        return given
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return given
    wanted = {parameter.name for parameter in parameters}
    return {key: value for key, value in given.items() if key in wanted}
