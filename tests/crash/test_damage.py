"""Whatever is done to the files of a run: what comes back is right, or is rejected with its reason.

Each example damages a run of two ranks with two checkpoints in one to three ways and opens it with the
recovery code. Nothing but our own exceptions may come out, a reason fits one line, no array that
is handed out differs from what was saved, and no buffer is taken that is larger than the files.
ROLLFORWARD_DAMAGE sets the number for the soak, which is run by name.
"""

import contextlib
import json
import os
import tracemalloc

import numpy as np
import pytest
from crash_run import RETENTION, ROOT, Tree, open_storage, save, state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lockstep import LockStep
from simulated_disk import SimulatedDisk

from rollforward.errors import CheckpointInvalid, NothingToResume
from rollforward.position import Position
from rollforward.store import CheckpointStore, find, list_checkpoints, read_attachments, read_tensors
from rollforward.store.digests import digest

SOAK = int(os.environ.get("ROLLFORWARD_DAMAGE", "12000"))
RANKS = 2
CASES = 8
"""Damaged runs an example: hypothesis' own work for each example is then small beside ours."""


def whole_run() -> Tree:
    disk = SimulatedDisk()
    disk.mkdir("/data")

    def body(rank, exchange):
        about = {"rank": rank, "world_size": RANKS, "exchange": exchange, "retention": RETENTION}
        store = CheckpointStore(open_storage(disk), **about)
        for step in (4, 5):
            save(store, 1, step)

    assert LockStep(RANKS).run(body) == [None] * RANKS
    return disk.tree()


WHOLE = whole_run()
FILES = sorted(path for path, content in WHOLE.items() if content is not None)
MANIFESTS = [path for path in FILES if "/commits/" in path]
TENSORS = [path for path in FILES if path.endswith(".safetensors")]
TABLES = [path for path in FILES if "/tables/" in path]

places = st.integers(0, 1 << 20)
numbers = st.one_of(st.integers(-5, 5), st.integers(0, 1 << 70), st.just((1 << 63) - 1))
junk = st.one_of(
    numbers,
    st.none(),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(
        ["../../../etc/passwd", "/etc/passwd", "", ".", "a/../b", "F64", "BF16", "0" * 32, "\ud800", "é"]
    ),
    st.lists(numbers, max_size=3),
    st.dictionaries(st.sampled_from(["a", "dtype"]), numbers, max_size=2),
)


def flip(tree, draw):
    path = draw(st.sampled_from(FILES))
    if content := bytearray(tree.get(path) or b""):
        content[draw(places) % len(content)] ^= 1 << draw(st.integers(0, 7))
        tree[path] = bytes(content)


def truncate(tree, draw):
    path = draw(st.sampled_from(FILES))
    content = tree.get(path) or b""
    tree[path] = content[: draw(places) % (len(content) + 1)]


def extend(tree, draw):
    path = draw(st.sampled_from(FILES))
    tree[path] = (tree.get(path) or b"") + draw(st.binary(min_size=1, max_size=20))


def zero_a_page(tree, draw):
    path = draw(st.sampled_from(FILES))
    content = tree.get(path) or b""
    begin = draw(places) % (len(content) // 512 + 1) * 512
    tree[path] = content[:begin] + bytes(len(content[begin : begin + 512])) + content[begin + 512 :]


def remove(tree, draw):
    tree.pop(draw(st.sampled_from(FILES)), None)


def swap(tree, draw):
    one, other = draw(st.sampled_from(FILES)), draw(st.sampled_from(FILES))
    if one in tree and other in tree:
        tree[one], tree[other] = tree[other], tree[one]


def replace_by_folder(tree, draw):
    tree[draw(st.sampled_from(FILES))] = None


def absurd_header(tree, draw):
    path = draw(st.sampled_from(TENSORS))
    length = draw(st.one_of(st.integers(0, 1 << 64), st.integers(0, 10_000))) % (1 << 64)
    tree[path] = length.to_bytes(8, "little") + (tree.get(path) or b"")[8:]


def edit(value, draw):
    """Change one place of a JSON value."""
    while isinstance(value, dict | list) and value:
        key = draw(st.sampled_from(sorted(value))) if isinstance(value, dict) else draw(places) % len(value)
        if not isinstance(value[key], dict | list) or not value[key] or draw(st.booleans()):
            action = draw(st.sampled_from(["set", "set", "set", "drop", "add"]))
            if action == "drop":
                del value[key]
            elif action == "add" and isinstance(value, list):
                value.append(value[key])
            else:
                value[key] = draw(junk)
            return
        value = value[key]


def edit_manifest(tree, draw):
    """An edit that is sealed with a fresh digest, so that only our own checks can find it."""
    path = draw(st.sampled_from(MANIFESTS))
    value = opened(tree.get(path))
    if value is not None:
        edit(value, draw)
        tree[path] = sealed(value)


def edit_table(tree, draw):
    """A table, edited and sealed; its manifest, sealed again, may name it."""
    rank, path = draw(st.sampled_from([*enumerate(TABLES)]))
    above = f"{ROOT}/commits/{path[-8:]}"
    value, manifest = opened(tree.get(path)), opened(tree.get(above))
    if value is None:
        return
    edit(value, draw)
    tree[path] = sealed(value)
    if manifest is not None and draw(st.booleans()):
        with contextlib.suppress(LookupError, TypeError):
            manifest["tables"][rank // 2][:2] = [len(tree[path]), tree[path][-35:-3].decode()]
        tree[above] = sealed(manifest)


def opened(content):
    """What a sealed file says, without its digest; None when it is damaged already."""
    try:
        value = json.loads(content or b"")
        del value["digest"]
    except (ValueError, KeyError, TypeError):
        return None
    return value


def sealed(value):
    body = json.dumps(value).encode()[:-1]
    return body + f',"digest":"{digest(body)}"}}\n'.encode()


def edit_header(tree, draw):
    """A tensor file's header, edited, with its length made to fit."""
    path = draw(st.sampled_from(TENSORS))
    content = tree.get(path) or b""
    try:
        length = int.from_bytes(content[:8], "little")
        value = json.loads(content[8 : 8 + length])
    except ValueError:
        return
    edit(value, draw)
    text = json.dumps(value).encode()
    text = text.ljust(length) if draw(st.booleans()) else text
    tree[path] = len(text).to_bytes(8, "little") + text + content[8 + length :]


def duplicate_key(tree, draw):
    path = draw(st.sampled_from(MANIFESTS))
    body = (tree.get(path) or b"")[:-46] + b',"position":"0_5"'
    tree[path] = body + f',"digest":"{digest(body)}"}}\n'.encode()


DAMAGE = [flip, flip, truncate, extend, zero_a_page, remove, swap, replace_by_folder]
DAMAGE += [absurd_header, edit_manifest, edit_manifest, edit_table, edit_table, edit_header, duplicate_key]


def recover(tree: Tree) -> bool:
    """Open it as a resuming run does; True when a checkpoint came back."""
    storage = open_storage(SimulatedDisk.of(tree))
    rejected: list[Position] = []
    reasons: list[str] = []
    for item in list_checkpoints(storage):
        assert item.valid or (item.reason and "\n" not in item.reason)
    while True:
        try:
            found = find(storage, skip=rejected)
        except NothingToResume:
            return False
        assert all("\n" not in item.reason for item in found.rejected)
        try:
            arrays = list(read_tensors(storage, found.manifest))
            attachments = read_attachments(storage, found.manifest)
        except CheckpointInvalid as error:
            rejected.append(found.manifest.position)
            reasons.append(error.message)
            continue
        assert not any("\n" in reason for reason in reasons)
        check(found.manifest, arrays, attachments)
        return True


def check(manifest, arrays, attachments):
    """Only an edit that the editor sealed can say something else; the tensors themselves never can."""
    expected = state(1, manifest.position.step)
    for role, name, array in arrays:
        if name in expected.get(role, {}) and array.dtype == expected[role][name].dtype:
            same = np.array_equal(array.ravel(), expected[role][name].ravel())
            assert same or manifest.digest not in SEALED, (role, name)
    assert set(attachments.values()) <= {b"{}"}


SEALED = {json.loads(WHOLE[path])["digest"] for path in MANIFESTS}


@settings(max_examples=2_000 // CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damage_is_rejected_with_its_reason_or_harmless(data):
    damage_and_recover(data)


@pytest.mark.slow
@settings(max_examples=SOAK // CASES, derandomize=False, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damage_is_rejected_with_its_reason_or_harmless_many_times(data):
    damage_and_recover(data)


def damage_and_recover(data):
    for _ in range(CASES):
        tree = dict(WHOLE)
        for damage in data.draw(st.lists(st.sampled_from(DAMAGE), min_size=1, max_size=3)):
            damage(tree, data.draw)
        recover(tree)


def test_the_whole_run_comes_back():
    assert recover(dict(WHOLE))


def test_a_header_that_claims_gigabytes_takes_no_memory():
    for length in (1 << 30, 1 << 40, (1 << 64) - 1):
        tree = dict(WHOLE)
        for path in TENSORS:
            tree[path] = length.to_bytes(8, "little") + WHOLE[path][8:]
        tracemalloc.start()
        try:
            assert not recover(tree)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_tables_that_claim_gigabytes_take_no_memory():
    tree = dict(WHOLE)
    for above in MANIFESTS:
        manifest = opened(WHOLE[above])
        manifest["tables"] = []
        for path in (path for path in TABLES if path.endswith(f"-{above[-8:]}")):
            table = opened(WHOLE[path])
            for piece in table["pieces"]:
                if piece[2] == "F32":
                    piece[3:] = [[1 << 28], piece[4], piece[4] + (1 << 30), "0" * 32 * 256]
            for file in table["files"]:
                file[1] = 1 << 32
            tree[path] = sealed(table)
            entry = [len(tree[path]), tree[path][-35:-3].decode(), [1 << 32] * len(table["files"])]
            manifest["tables"].append(entry)
        tree[above] = sealed(manifest)
    tracemalloc.start()
    try:
        assert not recover(tree)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
