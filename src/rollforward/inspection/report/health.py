"""What `verify` and `doctor` say about a run; its configuration and what changed; its versions."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rollforward.engines.base import Finding
from rollforward.inspection import doctor, verifying
from rollforward.inspection.history import Past
from rollforward.interop.role_folders import name_checkpoint_folders
from rollforward.replay import configurations
from rollforward.replay.facts import changes
from rollforward.storage import LocalStorage, Storage

DEEP_BYTES = 1 << 30
"""So much is read and digested without being asked to."""


def as_json(storage: Storage, past: Past, *, deep: bool) -> dict[str, Any]:
    """Verdicts, findings, configurations and versions. `deep`: read and digest every byte, however many."""
    size = verifying.bytes_to_check(storage)
    deep = deep or size <= DEEP_BYTES
    looking = verifying.Checkpoints(storage, deep=deep)
    checkpoints = list(looking.verdicts())
    return {
        "deep": deep,
        "bytes": size,
        "checkpoints": [
            {"position": str(found.position), "reason": found.reason, "bytes": found.bytes_read}
            for found in checkpoints
        ],
        "journals": [
            {"rank": each.rank, "size": each.size, "problems": each.problems, "torn": each.torn}
            for each in (verifying.check_journals(storage) if deep else ())
        ],
        "files": [asdict(file) for file in looking.other_files()],
        "findings": [asdict(finding) for finding in _findings(storage)],
        "configurations": _configurations(storage, past),
        "versions": _versions(past),
    }


def _findings(storage: Storage) -> list[Finding]:
    """What doctor sees at a glance; it looks at folders, so nothing in object storage."""
    if not isinstance(storage, LocalStorage):
        return []
    return list(doctor.examine_at_a_glance(name_checkpoint_folders("", "", Path(storage.root))))


def _configurations(storage: Storage, past: Past) -> list[dict[str, Any]]:
    """Each configuration that the run had, and how it differs from the one before; oldest first.

    Of a loop, which has no file of configurations, the facts that its checkpoints carry.
    """
    had = [
        (line["incarnation"], configurations.flat(line["config"])) for line in configurations.read(storage)
    ]
    if not had:
        had = [
            (info.manifest.incarnation, dict(facts))
            for info in reversed(past.checkpoints)
            if info.manifest and isinstance(facts := info.manifest.state.get("facts"), Mapping)
        ]
    found: list[dict[str, Any]] = []
    before: dict[str, Any] | None = None
    for start, keys in had:
        if before is None or keys != before:
            changed = [] if before is None else changes(before, keys)
            found.append({"start": start, "keys": _in_words(keys), "changed": changed})
            before = keys
    return found


def _in_words(keys: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in keys.items()}


def _versions(past: Past) -> list[dict[str, Any]]:
    """Of each start whose journal is there; of the checkpoints' starts otherwise. Oldest first."""
    found = {
        info.manifest.incarnation: dict(info.manifest.versions) for info in past.checkpoints if info.manifest
    } | {
        start.incarnation: dict(start.header.identity.versions)
        for start in past.starts
        if start.header is not None
    }
    return [{"start": start, "versions": found[start]} for start in sorted(found)]
