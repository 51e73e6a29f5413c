"""The configuration stored in a run's folder, so that a resume or a rebuild needs no `--config`.

    configurations.jsonl      {"incarnation": 1, "time": "...", "config": {"rl_config": {"seed": 7, ...}}}
                              {"incarnation": 4, "time": "...", "config": {...}}

One line for the first start, and one for each later start with a different configuration; the file is
replaced as a whole, durably, before the start's first step. A resume takes the last line; a rebuild takes the
one that was in force when the checkpoint it starts from was saved.

Every key is stored except those that name folders: where a run is written and which model it came from belong
to a start. A relative `dataset_file` is stored as the absolute path it referred to.

A folder is data, and may come from anyone. What it names is read, never run: a custom verifier
(`module:function`) counts only when the command line or the user's own configuration names it too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollforward.config.keys import Config, what_affects_numbers
from rollforward.config.loading import Carried, load
from rollforward.config.places import outputs
from rollforward.config.schema import meaning_of, walk
from rollforward.data.dataset import GYM_PREFIX
from rollforward.errors import ConfigError
from rollforward.position import Position
from rollforward.replay.configurations import FILE, Tree, flat, read
from rollforward.run.places import resumed_storage
from rollforward.storage import Storage
from rollforward.store.catalog import candidates
from rollforward.store.journal.writing import utc_now
from rollforward.store.manifest import Manifest


def tree_of(config: Config) -> dict[str, Any]:
    """The part of a configuration that belongs to the run."""
    tree: dict[str, Any] = {}
    values = asdict(config)
    for path, declared, _ in walk(Config):
        if meaning_of(declared).is_path and path != "rl_config.dataset_file":
            continue
        *sections, name = path.split(".")
        value: Any = values
        below = tree
        for section in sections:
            value, below = value[section], below.setdefault(section, {})
        below[name] = list(value[name]) if isinstance(value[name], tuple) else value[name]
    dataset = config.rl_config.dataset_file
    if dataset and not dataset.startswith(GYM_PREFIX):
        tree["rl_config"]["dataset_file"] = str(Path(dataset).absolute())
    return tree


def carried(storage: Storage, until: Position | None = None) -> Carried | None:
    """The configuration stored in a run's folder; None when there is no readable one.

    With `until`, the one in force at the newest checkpoint at or before it, rather than the last one.
    """
    found = read(storage)
    if until is not None:
        before = (item for item in candidates(storage) if isinstance(item, Manifest))
        base = next((item.incarnation for item in before if item.position <= until), 0)
        found = [line for line in found if line["incarnation"] <= base]
    return Carried(f"{storage}/{FILE}", found[-1]["config"]) if found else None


def keep(storage: Storage, incarnation: int, config: Config) -> None:
    """Record durably which configuration a start has, unless the previous start had the same one."""
    lines, tree = read(storage), tree_of(config)
    if lines and lines[-1]["config"] == tree:
        return
    lines.append({"incarnation": incarnation, "time": utc_now(), "config": tree})
    storage.write(FILE, ["".join(json.dumps(line) + "\n" for line in lines).encode()])


def differences(before: Tree, config: Config) -> list[str]:
    """The changed keys, one line each, among those that do not affect the numbers.

    Keys that do are facts of the run, and are compared as such.
    """
    then, now = flat(before), flat(tree_of(config))
    told = [name for name in now if name not in what_affects_numbers(config)]
    return [
        f"{name} is {now[name]!r}, and was {then[name]!r}"
        for name in told
        if name in then and then[name] != now[name]
    ]


def of_resumed(
    given: Sequence[tuple[str, Any]], *, actor: str, reference: str, until: Position | None
) -> Carried | None:
    """The configuration of the run that a command line resumes; `actor` and `reference` as given there."""
    save = [item for item in given if item[0] == "actor_config.save"]
    return carried(resumed_storage(actor, reference, outputs(load(None, save).config)), until)


def check_named(base: Carried, given: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The options to apply over a stored configuration; ConfigError when it names code and they do not."""
    reward = base.tree.get("reward_config")
    stored = reward.get("verifier_function") if isinstance(reward, Mapping) else None
    names = [name for name in stored if isinstance(name, str)] if isinstance(stored, list) else []
    named = [value for path, value in given if path == "reward_config.verifier_function"]
    if not named and any(":" in name for name in names):
        mine = ", ".join(name for name in names if ":" in name)
        raise ConfigError(
            f"{base.source}: the run was trained with {mine}, which is your own code: what a run's folder "
            "names is not run unless you name it too",
            hint=f"--verifier_function {','.join(names)}, or --config with the run's configuration",
        )
    if named and named[-1] == names:
        # Naming the run's own verifiers changes nothing, and neither do their weights.
        return [item for item in given if item != ("reward_config.verifier_weight", [])]
    return list(given)
