"""Reading the configuration: a YAML file, overridden by the command line, checked as a whole.

YAML is read as data: tags that would create Python objects are refused. A file's size is bounded before it is
read. Too deep nesting, anchors that repeat and huge numbers end in an error that names the place.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rollforward.config.elsewhere import KEYS
from rollforward.config.ignored import is_ignored
from rollforward.config.keys import Config
from rollforward.config.schema import Problems, parse
from rollforward.errors import ConfigError
from rollforward.inputs import read_input

_MOST_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A configuration, and which keys were accepted although they mean nothing here."""

    config: Config
    ignored: tuple[str, ...]
    carried_by: str = ""
    """The file in a run's folder that it was read from; "" when the user gave it."""


@dataclass(frozen=True)
class Carried:
    """A configuration stored in a run's folder."""

    source: str
    """For messages."""
    tree: Mapping[str, Any]
    """Sections of keys, as in YAML."""


def load(
    file: str | None, overrides: Sequence[tuple[str, Any]] = (), *, carried: Carried | None = None
) -> Loaded:
    """Read a YAML file (None: all defaults) and apply `overrides`, (dotted key, value), to it.

    `carried` is used when no file is given. Raises ConfigError with every problem found, in the file and
    in the overrides.
    """
    source = file or "command line"
    tree: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if file is not None:
        tree, lines = _read(file)
    elif carried is not None:
        source, tree = carried.source, copy.deepcopy(dict(carried.tree))
    for path, value in overrides:
        _put(tree, path, value)
    given = frozenset(path for path, _value in overrides)
    problems = Problems(source=source, lines=lines, overridden=given)
    config = parse(Config, tree, problems, ignored=is_ignored, elsewhere=KEYS)
    _check_together(config, problems)
    problems.raise_any()
    return Loaded(
        config=config,
        ignored=tuple(path for path in _paths(tree) if is_ignored(path)),
        carried_by=carried.source if file is None and carried is not None else "",
    )


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value`, the value parsed as YAML; ConfigError when it does not have that form."""
    path, equals, value = text.partition("=")
    if not equals or "." not in path:
        raise ConfigError(
            f"--set {text}: expected section.key=value",
            hint="write it as in --set rl_config.seed=7",
        )
    return path.strip(), _parse(value, f"--set {text[:200]}")[0]


def _check_together(config: Config, problems: Problems) -> None:
    """Rules that span several keys."""
    reward, schedule = config.reward_config, config.actor_config.lr_schedule
    names, weights = reward.verifier_function, reward.verifier_weight
    if not names:
        problems.add("reward_config.verifier_function", "name at least one verifier")
    if weights and len(weights) != len(names):
        problems.add(
            "reward_config.verifier_weight",
            f"{len(weights)} weights for {len(names)} verifiers ({', '.join(names)})",
            "give one weight for each verifier, or leave the weights out",
        )
    metrics = ("reward", *(f"reward/{name}" for name in names))
    if config.rl_config.best_ckpt_metric not in metrics:
        problems.add(
            "rl_config.best_ckpt_metric",
            f"must be one of {', '.join(metrics)}; it is {config.rl_config.best_ckpt_metric!r}",
        )
    if schedule.decay_steps and schedule.decay_steps <= schedule.warmup_step:
        problems.add(
            "actor_config.lr_schedule.decay_steps",
            f"must be greater than warmup_step ({schedule.warmup_step}); it is {schedule.decay_steps}",
        )
    if schedule.min_lr > schedule.lr:
        problems.add(
            "actor_config.lr_schedule.min_lr",
            f"must not be greater than lr ({schedule.lr:g}); it is {schedule.min_lr:g}",
        )
    _check_parallel(config, problems)
    _check_memory(config, problems)
    generate, limit = config.generate_config, config.rl_config.seq_length
    needed = generate.max_prompt_length + generate.sampling_config.max_tokens
    if limit and needed > limit:
        problems.add(
            "rl_config.seq_length",
            f"is {limit}, but max_prompt_length {generate.max_prompt_length} + max_tokens "
            f"{generate.sampling_config.max_tokens} = {needed}",
            "raise seq_length, or lower one of the two",
        )
    if generate.sampling_config.top_p == 0:
        problems.add("generate_config.sampling_config.top_p", "must be greater than 0")


def _check_parallel(config: Config, problems: Problems) -> None:
    """What a model that is cut over workers cannot be."""
    actor = config.actor_config
    for name in ("pipeline_stage", "context_parallel", "expert_parallel"):
        given = getattr(actor.parallel_config, name)
        if given > 1:
            problems.add(
                f"actor_config.parallel_config.{name}",
                f"is {given}, and nothing here does that",
                "leave it out, or set it to 1; model_parallel cuts a model over workers",
            )


def _check_memory(config: Config, problems: Problems) -> None:
    """Rules of recomputing and of adapters."""
    actor, sync = config.actor_config, config.ref_config.sync_ref_model
    for name, why in (
        ("select_recompute", "single operators cannot be chosen to be computed again"),
        ("recompute_slice_activation", "what is kept of a layer is not cut over devices"),
    ):
        if getattr(actor.recompute_config, name):
            path = f"actor_config.recompute_config.{name}"
            problems.add(path, f"is not supported: {why}", "set recompute: true instead, for whole layers")
    lora = actor.lora
    if not lora.rank:
        return
    if not lora.target_modules:
        problems.add("actor_config.lora.target_modules", "name at least one part, or leave it out")
    if len(set(lora.target_modules)) < len(lora.target_modules):
        problems.add("actor_config.lora.target_modules", "names a part twice")
    if not lora.alpha:
        problems.add("actor_config.lora.alpha", "must be greater than 0: with 0 nothing is learnt")
    if sync:
        problems.add(
            "ref_config.sync_ref_model",
            "cannot be true with actor_config.lora: the reference is the base with the adapters off, which "
            "cannot follow the policy",
            "set sync_ref_model: false, or train all weights (lora.rank: 0)",
        )
    if config.ref_config.load:
        problems.add(
            "ref_config.load",
            "cannot be given with actor_config.lora: the reference is the base with the adapters off",
            "leave it out",
        )


def _read(file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file, and the line of each dotted key."""
    try:
        text = read_input(file, _MOST_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file", hint="give the configuration with --config FILE") from None
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read: {error.strerror or error}", hint="give a YAML file with --config FILE"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}", hint="save it as UTF-8") from None
    tree, root = _parse(text, file)
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file}: expected sections such as rl_config at the top, got {type(tree).__name__}"
        )
    lines: dict[str, int] = {}
    _note_lines(root, "", file, lines, set())
    return tree, lines


def _parse(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """The value of YAML text, and its nodes; ConfigError, naming `where`, when it is not valid."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{where}: it nests too deep", hint="sections nest three deep") from None
    except (yaml.YAMLError, ValueError, ArithmeticError, TypeError, AttributeError, LookupError) as error:
        # PyYAML builds numbers and dates with Python's own functions and does not catch their errors.
        said = " ".join(str(error).split())[:300]
        hint = "a configuration is data: numbers, text, lists and sections"
        raise ConfigError(f"{where}: not valid YAML: {said}", hint=hint) from None
    return value, root


def _note_lines(
    node: yaml.Node | None, prefix: str, file: str, lines: dict[str, int], seen: set[int]
) -> None:
    # What an anchor repeats is recorded only where it first appears: nested anchors would make a few lines
    # stand for billions, and an anchor that contains itself would never end.
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    for name, value in node.value:
        path = f"{prefix}{name.value}"
        line = name.start_mark.line + 1
        if path in lines:
            # YAML would silently keep the last one.
            raise ConfigError(f"{file}:{line}: {path}: given twice, first on line {lines[path]}")
        lines[path] = line
        _note_lines(value, f"{path}.", file, lines, seen)


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for part in sections:
        below = tree.get(part)
        if not isinstance(below, dict):
            below = tree[part] = {}
        tree = below
    tree[name] = value


def _paths(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of a tree, as deep as our keys go; an ignored section counts as one."""
    found: list[str] = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and not is_ignored(path):
            found.extend(_paths(value, f"{path}."))
        else:
            found.append(path)
    return found
