"""Everything that affects the numbers of a run, by name; compared when the run is resumed.

    keys of the configuration      those that affect numbers, by their dotted names
    chunks_per_step                workers x num_rollouts when the run started; a resume keeps it
    decay_steps                    derived from the others
    model                          digest of the model's config.json
    base                           of a run of adapters: digest of the weights that they stand beside
    file NAME                      digest of each tokenizer file that is read; null: it does not exist
    end_tokens, pad_token          as in force, from the configuration or from these files
    dataset, dataset_text          digests of the prompts' tokens with the answers, and of their text
    dataset_columns                column -> digest, for all columns, since verifiers are given all of them
    verifier NAME                  digest of a verifier's sources, version of a library that it judges with

There are two kinds, by what a change means. Most make it a different run: what was finished after the
checkpoint is generated again. Facts of verifiers do not: their rewards are in the journal, so finished
work keeps them.

Different versions of this program know different facts. A checkpoint is compared by the facts that its
version knew; a fact it did not know is not a change. `fingerprints` gives the matching journal digests.
In place of `chunks_per_step`, earlier versions had its two factors.

Not known, so not compared: what a verifier imports or reads, the exact processor model, the number of
threads (which changed no bit where tried), library code that changed under the same version.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rollforward.grpo.types import Prompt
from rollforward.replay.facts import changes, fingerprint
from rollforward.store.tensorfile import is_count

_VERIFIER = "verifier "
_FILE = "file "
_CHUNKS = "chunks_per_step"
_FACTORS = ("world_size", "rl_config.num_rollouts")


def of_step(chunks_per_step: int) -> dict[str, Any]:
    """The fact of how a step is cut into chunks: it decides prompts, random numbers and order of addition."""
    return {_CHUNKS: chunks_per_step}


def chunks_in(facts: Mapping[str, Any]) -> int | None:
    """The number of chunks per step in the facts of a checkpoint; None when they do not say."""
    if _CHUNKS in facts:
        return facts[_CHUNKS] if is_count(facts[_CHUNKS]) else None
    workers, each = (facts.get(name, 0) for name in _FACTORS)
    return (workers * each or None) if is_count(workers) and is_count(each) else None


def of_files(files: Mapping[str, bytes], names: Iterable[str]) -> dict[str, Any]:
    """The facts of the tokenizer files that a run reads; `names` are all those it would read."""
    found = {name: hashlib.sha256(files[name]).hexdigest() if name in files else None for name in names}
    return {f"{_FILE}{name}": value for name, value in found.items()}


def of_verifiers(described: Mapping[str, str]) -> dict[str, Any]:
    """The facts of `verifiers.sources.describe`."""
    return {f"{_VERIFIER}{name}": value for name, value in described.items()}


def of_dataset(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The facts of everything that a dataset gives to generation and verifiers."""
    columns = sorted({name for prompt in prompts for name in prompt.columns})
    # Computed as the first version of this program did, since its checkpoints are compared by it.
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
    """Every digest that a journal may have for these facts: of all of them, and of those `before` knew."""
    return frozenset({fingerprint_of(facts), fingerprint_of(known(facts, before))})


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """The digest of the facts that identify a run; those of verifiers are not included."""
    return fingerprint({name: value for name, value in facts.items() if not name.startswith(_VERIFIER)})


def known(facts: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The facts known to the version of this program that recorded `before`."""
    found = {name: value for name, value in facts.items() if name in before}
    if _CHUNKS not in before and chunks_in(before) == facts.get(_CHUNKS):
        found |= {name: before[name] for name in _FACTORS if name in before}
    return found


def warnings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed since a checkpoint was saved and what that means, one line each."""
    found = _changed(before, now)
    made = [line for name, line in found if not name.startswith(_VERIFIER)]
    judged = [line for name, line in found if name.startswith(_VERIFIER)]
    lines = [f"since the checkpoint was saved {line}" for line in made]
    if made:
        lines.append("steps finished after the checkpoint are generated again, with the present settings")
    lines += [
        f"since the checkpoint was saved {line}: finished steps keep the rewards that were recorded, "
        "new ones get those of now"
        for line in judged
    ]
    return lines


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences that make it a different run, one line each."""
    return [line for name, line in _changed(before, now) if not name.startswith(_VERIFIER)]


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and description of each change."""
    then, here = dict(before), known(now, before)
    found: list[tuple[str, str]] = []
    for name in sorted({*then, *here}):
        if name not in here and name.startswith(_VERIFIER):
            continue  # of a verifier that is no longer configured: its name says so
        old, new = then.get(name), here.get(name)
        if old != new:
            found += [(name, line) for line in _in_words(name, old, new)]
    return found


def _in_words(name: str, old: Any, new: Any) -> list[str]:
    words = {
        "model": "the model's config.json changed",
        "base": "the weights of the adapters' base changed",
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
    """The value as JSON. A problem generator may yield anything: what JSON lacks is replaced by its type."""
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
