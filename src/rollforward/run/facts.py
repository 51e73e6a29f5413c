"""What reaches the numbers of a run, gathered under names, and compared when the run is resumed.

    keys of the configuration      those that affect numbers, by their dotted names
    world_size, decay_steps        what follows from others
    model                          digest of the model's config.json
    file NAME                      digest of each file of the tokenizer that is read; null: there is none
    end_tokens, pad_token          in force, from the configuration or from these files
    dataset, dataset_text          digests of the prompts' tokens with the answers, and of their text
    dataset_columns                column -> digest; a list of columns, since verifiers are handed all of them
    verifier NAME                  digest of a verifier's sources, version of a library that it judges with

Two kinds, by what follows when one has changed. Most make another run: what was finished after the
checkpoint is generated anew. Those of verifiers do not: their rewards are in the journal, so what was
finished keeps them.

Versions of this program know different facts. A checkpoint is compared with by the facts that its version
knew; one that it did not know is no change. `fingerprints` makes the digests of the journal fit.

Not known, and so not compared: what a verifier imports or reads, the processor within its kind, threads
(which changed no bit where it was tried), the code of libraries under an unchanged version.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rollforward.grpo.types import Prompt
from rollforward.replay.facts import changes, fingerprint

_VERIFIER = "verifier "
_FILE = "file "


def of_files(files: Mapping[str, bytes], names: Iterable[str]) -> dict[str, Any]:
    """The facts of the files that a run reads of its tokenizer; `names` are all that it would read."""
    found = {name: hashlib.sha256(files[name]).hexdigest() if name in files else None for name in names}
    return {f"{_FILE}{name}": value for name, value in found.items()}


def of_verifiers(described: Mapping[str, str]) -> dict[str, Any]:
    """The facts of `verifiers.sources.describe`."""
    return {f"{_VERIFIER}{name}": value for name, value in described.items()}


def of_dataset(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The facts of everything that a dataset hands to generation and verifiers."""
    columns = sorted({name for prompt in prompts for name in prompt.columns})
    # As the first version of this program made it: its checkpoints are compared by it.
    tokens = "".join(repr((prompt.token_ids, prompt.answer)) for prompt in prompts)
    return {
        "dataset": hashlib.sha256(tokens.encode()).hexdigest(),
        "dataset_text": _digest(json.dumps(prompt.text) for prompt in prompts),
        "dataset_columns": {
            name: _digest(_text(prompt.columns[name]) if name in prompt.columns else "" for prompt in prompts)
            for name in columns
        },
    }


def fingerprints(facts: Mapping[str, Any], before: Mapping[str, Any]) -> frozenset[str]:
    """Every digest by which a journal may name these facts: of all, and of those that `before` knew."""
    return frozenset({fingerprint_of(facts), fingerprint_of(known(facts, before))})


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """The digest of the facts that make a run; those of verifiers are not among them."""
    return fingerprint({name: value for name, value in facts.items() if not name.startswith(_VERIFIER)})


def known(facts: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a version of this program knew which named those of `before`."""
    return {name: value for name, value in facts.items() if name in before}


def warnings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed since a checkpoint was saved, a line each, and what follows."""
    found = _changed(before, now)
    made = [line for name, line in found if not name.startswith(_VERIFIER)]
    judged = [line for name, line in found if name.startswith(_VERIFIER)]
    lines = [f"since the checkpoint was saved {line}" for line in made]
    if made:
        lines.append("steps finished after the checkpoint are generated anew, as the run is now")
    lines += [
        f"since the checkpoint was saved {line}: finished steps keep the rewards that were recorded, "
        "new ones get those of now"
        for line in judged
    ]
    return lines


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two sets of facts makes other runs, a line each."""
    return [line for name, line in _changed(before, now) if not name.startswith(_VERIFIER)]


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and words of each change."""
    then, here = dict(before), known(now, before)
    found: list[tuple[str, str]] = []
    for name in sorted({*then, *here}):
        if name not in here and name.startswith(_VERIFIER):
            continue  # of a verifier that is no longer named: its name tells
        old, new = then.get(name), here.get(name)
        if old != new:
            found += [(name, line) for line in _in_words(name, old, new)]
    return found


def _in_words(name: str, old: Any, new: Any) -> list[str]:
    words = {
        "model": "the model's config.json changed",
        "dataset": "the dataset's prompts, as tokens, or its answers changed",
        "dataset_text": "the text of the dataset's prompts changed",
    }
    if name in words:
        return [words[name]]
    if name == "dataset_columns" and isinstance(old, dict) and isinstance(new, dict):
        return [
            f"column {column!r} of the dataset {_what_became(old.get(column), new.get(column))}"
            for column in sorted({*old, *new})
            if old.get(column) != new.get(column)
        ]
    if name.startswith(_FILE):
        return [f"{name.removeprefix(_FILE)} of the tokenizer {_what_became(old, new)}"]
    if name.startswith(_VERIFIER):
        of = name.removeprefix(_VERIFIER)
        if len(str(old)) == len(str(new)) == 64:
            return [f"the source of verifier {of} changed"]
        return [f"{of}, which verifiers use, changed from {old} to {new}"]
    return changes({name: old}, {name: new})


def _what_became(old: Any, new: Any) -> str:
    return "is new" if old is None else "is gone" if new is None else "changed"


def _digest(texts: Iterable[str]) -> str:
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return whole.hexdigest()


def _text(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    """As JSON has it. A generator of problems may give anything: what JSON lacks counts by its type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_text(inner) for inner in value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return type(value).__qualname__
