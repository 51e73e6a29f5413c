"""The configuration that a run's folder carries, so that a resume and a rebuild need no `--config`.

    configurations.jsonl      {"incarnation": 1, "time": "...", "config": {"rl_config": {"seed": 7, ...}}}
                              {"incarnation": 4, "time": "...", "config": {...}}

A line for the first start, and for each later one that had another configuration; the file is replaced as
a whole, durably, before the start's first step. A resume takes the last line; a rebuild takes the one that
was in force when the checkpoint that it goes on from was saved.

Every key is there but those that name folders: where a run is written to and which model it came from belong
to a start. A relative `dataset_file` is kept as the absolute path that it meant.

A folder is data, and may be from anybody. What it names is read, never run: a verifier of the user's own
(`module:function`) counts only when the command or a configuration of the user's names it too.
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
from rollforward.errors import ConfigError, StorageError
from rollforward.interop.role_folders import name_checkpoint_folders
from rollforward.position import Position
from rollforward.storage import LocalStorage, Storage, read_small
from rollforward.store.catalog import candidates
from rollforward.store.journal.writing import utc_now
from rollforward.store.manifest import Manifest

FILE = "configurations.jsonl"
_MOST_BYTES = 16 << 20

Tree = Mapping[str, Any]
"""Sections of keys, as in YAML."""


def tree_of(config: Config) -> dict[str, Any]:
    """What of a configuration belongs to the run."""
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


def carried(run: Path, until: Position | None = None) -> Carried | None:
    """The configuration that a run's folder carries; None when it has none that can be read.

    `until`: the one that was in force at the newest checkpoint not after it, rather than the last one.
    """
    storage = LocalStorage(run)
    found = _read(storage)
    if until is not None:
        before = (item for item in candidates(storage) if isinstance(item, Manifest))
        base = next((item.incarnation for item in before if item.position <= until), 0)
        found = [line for line in found if line["incarnation"] <= base]
    return Carried(str(run / FILE), found[-1]["config"]) if found else None


def keep(storage: Storage, incarnation: int, config: Config) -> None:
    """Say, durably, which configuration a start has, unless the one before had the same."""
    lines, tree = _read(storage), tree_of(config)
    if lines and lines[-1]["config"] == tree:
        return
    lines.append({"incarnation": incarnation, "time": utc_now(), "config": tree})
    storage.write(FILE, ["".join(json.dumps(line) + "\n" for line in lines).encode()])


def differences(before: Tree, config: Config) -> list[str]:
    """What is not as the run had it, a line each, of the keys that do not influence numbers.

    Those that do are facts of the run, and compared as such.
    """
    then, now = _flat(before), _flat(tree_of(config))
    told = [name for name in now if name not in what_affects_numbers(config)]
    return [
        f"{name} is {now[name]!r}, and was {then[name]!r}"
        for name in told
        if name in then and then[name] != now[name]
    ]


def of_resumed(
    given: Sequence[tuple[str, Any]], *, actor: str, reference: str, until: Position | None
) -> Carried | None:
    """The configuration of the run that a command line resumes; `actor` and `reference` as it names them."""
    save = [item for item in given if item[0] == "actor_config.save"]
    run = outputs(load(None, save).config).run
    return carried(name_checkpoint_folders(actor, reference, run).run, until)


def check_named(base: Carried, given: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The options to put over a carried configuration; ConfigError when it names code and they do not."""
    reward = base.tree.get("reward_config")
    stored = reward.get("verifier_function") if isinstance(reward, Mapping) else None
    names = [name for name in stored if isinstance(name, str)] if isinstance(stored, list) else []
    named = [value for path, value in given if path == "reward_config.verifier_function"]
    if not named and any(":" in name for name in names):
        mine = ", ".join(name for name in names if ":" in name)
        raise ConfigError(
            f"{base.source}: the run was trained with {mine}, which is code of yours: what a run's folder "
            "names is not run unless you name it too",
            hint=f"--verifier_function {','.join(names)}, or --config with the run's configuration",
        )
    if named and named[-1] == names:
        # Naming the run's own verifiers changes nothing, their weights neither.
        return [item for item in given if item != ("reward_config.verifier_weight", [])]
    return list(given)


def _read(storage: Storage) -> list[dict[str, Any]]:
    """The lines of the file, oldest first; what is none is passed over."""
    try:
        if storage.stat(FILE) is None:
            return []
        lines = read_small(storage, FILE, limit=_MOST_BYTES).splitlines()
    except StorageError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(value, dict)
            and type(value.get("incarnation")) is int
            and isinstance(value.get("config"), dict)
        ):
            found.append(value)
    return found


def _flat(tree: Tree, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
