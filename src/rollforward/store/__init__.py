"""What survives: checkpoints on disk, format versions 1 and 2.

    save_ckpt/                                     the run's folder
    ├── train/rank_0/policy_model_rank_0-0_20.safetensors, meta.json
    ├── optimizer/rank_0/optimizer_rank_0-0_20.safetensors, meta.json
    ├── ref/rank_0/ref_rank_0-0_20.safetensors, meta.json
    ├── critic/rank_0/critic_rank_0-0_20.safetensors, meta.json      any other role, in a folder with its name
    ├── model/config.json, tokenizer.json ...      small files the run needs to start: attachments
    ├── model.copy/config.json, tokenizer.json ... a second copy: all checkpoints share them
    ├── commits/0_20.json                          the manifest: the checkpoint exists when this does
    ├── journal/rank_0/...                         the redo log
    ├── guests.json                                another trainer's files that were here before (see guests)
    └── run.lock                                   who trains here: 512 bytes, JSON padded with spaces

A **role** is a named group of tensors. `policy_model`, `optimizer` and `ref` have the folders that
the contract gives them; a user of the library may have others. The name of a role is a lowercase
letter followed by up to 39 lowercase letters, digits and underscores; it is also the name of its
folder and the prefix of its files. The names in `layout.RESERVED` are other folders of a run and
cannot be roles.

A **tensor file** is plain safetensors: eight bytes with the header's length (little-endian), the
header (JSON, padded with spaces so that the data starts at a multiple of 4,096), then the data
without gaps, tensors with larger elements first. Each tensor has a digest, XXH3-128 of its
bytes. The file's digest is XXH3-128 over the 16-byte digest of everything before the data
followed by the 16-byte digests of its tensors in file order: it covers every byte, and a single
pass over the data checks both the file and each tensor.

Each rank has one file per role. A tensor that is the same on all ranks is written by one of
them, balanced by size, so a rank's file may hold few tensors or none. `meta.json` next to it
has the three keys `last_epoch`, `last_step`, `last_ckpt_file` and names the rank's newest
committed file of that role. It is derived from the manifest, which is authoritative.

A **manifest** is JSON, one entry per line; its last 46 bytes are `,"digest":"` + 32 hexadecimal
digits + `"}` + newline, and the digits are the XXH3-128 of every byte before them. It starts with
`{"format":"rollforward checkpoint","version":V,"incarnation":N,` so that checkpoints can be
ordered without reading whole manifests. V is 1 when there are only the contract's three roles,
and 2 when there are others: nothing else differs, and a program that knows only version 1 reports
that instead of ignoring a role. Checkpoints are ordered by (incarnation, position): a later start
of the run that resumed from an earlier position is newer.

**Rules.** A file that any manifest lists is never replaced: a second checkpoint of the same
position adds `.1` to the prefix (`policy_model.1_rank_0-0_20.safetensors`). A manifest is
published, by rename, after every file it lists is durable. Removal works in reverse order:
first the manifest, then a sync of the folder, then the files that no other manifest lists. A file
whose name is not one of ours is never touched. Of the roles outside the contract, we only look into
the folders of those that a readable manifest lists or that this process saves: any other folder is
not ours.

Nothing here imports a framework, and nothing here is pickled.
"""

from rollforward.store.catalog import CheckpointInfo, Found, find, list_checkpoints, load_manifest
from rollforward.store.checkpoints import CheckpointStore
from rollforward.store.lock import RunLock, newest_incarnation
from rollforward.store.manifest import Manifest
from rollforward.store.restoring import (
    check_layout,
    locate_attachments,
    read_attachments,
    read_tensors,
    restore_into,
)
from rollforward.store.retention import Retention
from rollforward.store.saved import Saved
from rollforward.store.shadow import ShadowCheckpoints

__all__ = [
    "CheckpointInfo",
    "CheckpointStore",
    "Found",
    "Manifest",
    "Retention",
    "RunLock",
    "Saved",
    "ShadowCheckpoints",
    "check_layout",
    "find",
    "list_checkpoints",
    "load_manifest",
    "locate_attachments",
    "newest_incarnation",
    "read_attachments",
    "read_tensors",
    "restore_into",
]
