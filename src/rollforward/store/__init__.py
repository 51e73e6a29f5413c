"""What survives: checkpoints on disk, format version 3; versions 1 and 2 are read.

    save_ckpt/                                     the run's folder
    ├── train/rank_0/policy_model_rank_0-0_20.safetensors, meta.json
    ├── optimizer/rank_0/optimizer_rank_0-0_20.safetensors, meta.json
    ├── ref/rank_0/ref_rank_0-0_20.safetensors, meta.json
    ├── critic/rank_0/critic_rank_0-0_20.safetensors, meta.json      any other role, in a folder with its name
    ├── tables/rank_0/table_rank_0-0_20.json       what a rank holds of a checkpoint, piece by piece
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

A **piece** is a box of a tensor: an offset and a shape, within the tensor's own. The pieces of all ranks
cover each tensor exactly once. A tensor that is the same on all ranks is one whole piece, written by one of
them, balanced by size; a tensor that is split over the ranks is in as many pieces as they hold, each written
by its rank. What is read back is any boxes on any number of ranks, whatever they were when it was saved.

A **tensor file** is plain safetensors: eight bytes with the header's length (little-endian), the
header (JSON, padded with spaces so that the data starts at a multiple of 4,096), then the data
without gaps, tensors with larger elements first. A piece is an ordinary tensor in it. Each rank has one file
per role, which may hold few pieces or none.

A piece is digested in **blocks** of whole rows: XXH3-128 of the bytes of each. A block has as many rows as
fit in 4 MiB, and at least one, counted from the first row of the whole tensor: so a rank reads and verifies
no more than it needs, and a tensor that is cut between blocks has the digests of the whole. The file's
digest is XXH3-128 over the 16-byte digest of everything before the data followed by the 16-byte digests of
its blocks in file order: it covers every byte, and a single pass over the data checks both.

A **table** lists what a rank holds: its files with their sizes and digests, and for each piece the name of
its entry, its dtype, shape, byte range and digests, and, unless it is a whole tensor, its tensor's name and
shape and its offset. The table says first which tensors have their first element in it. It is JSON, one
entry per line, and ends like a manifest.

A **manifest** is JSON, one entry per line; its last 46 bytes are `,"digest":"` + 32 hexadecimal digits +
`"}` + newline, and the digits are the XXH3-128 of every byte before them. It starts with
`{"format":"rollforward checkpoint","version":V,"incarnation":N,` so that checkpoints can be ordered without
reading whole manifests. For each role it names the position and attempt of its files, the number of its
tensors and a digest of their content; for each rank, the size and digest of its table and the sizes of its
files. So its size depends on the number of ranks, not on that of tensors, and whether all files are there
can be seen without reading a table. Checkpoints are ordered by (incarnation, position): a later start of
the run that resumed from an earlier position is newer.

`meta.json` next to a rank's tensor files has the three keys `last_epoch`, `last_step`, `last_ckpt_file` and
names the rank's newest committed file of that role. It is derived from the manifest, which is authoritative.

**Rules.** A file that any manifest lists is never replaced: a second checkpoint of the same position adds
`.1` to the prefix (`policy_model.1_rank_0-0_20.safetensors`). A manifest is published, by rename, after
every file it lists is durable: a rank writes its tensor files, then its table. Removal works in reverse
order: first the manifest, then a sync of the folder, then the files that no other manifest lists. A file
whose name is not one of ours is never touched. Of the roles outside the contract, we only look into the
folders of those that a readable manifest lists or that this process saves: any other folder is not ours.

**Earlier versions.** In versions 1 and 2 there are no tables: the manifest lists every file and every
tensor, each whole, with one digest for all its bytes. Version 2 is version 1 with roles outside the
contract. Both are read for good (`earlier`), and a checkpoint of today may share the files of a role with
one of theirs.

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
    read_boxes,
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
    "read_boxes",
    "read_tensors",
    "restore_into",
]
