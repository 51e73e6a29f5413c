"""No damage to a journal is taken for rollouts, and none ends in an error that is not ours."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_run import ROOT, SCRIPT, JournalRun, open_storage, payload_of, record, step
from simulated_disk import SimulatedDisk

from rollforward.errors import CheckpointInvalid
from rollforward.replay.codec import unpack, unpack_outcome
from rollforward.store.journal.frames import FRONT_BYTES, NO_SALT, encode_frame
from rollforward.store.journal.reading import read_journal
from rollforward.store.journal.segments import read_record
from rollforward.store.journal.upkeep import repair

FOLDER = f"{ROOT}/journal/rank_0"
KINDS = ("flip", "cut", "zero", "insert", "remove", "repeat", "exchange", "delete", "rename")


@pytest.fixture(scope="module")
def run() -> JournalRun:
    return record(SCRIPT)


def damaged(content: bytes, kind: str, at: float, length: int) -> bytes:
    """One kind of damage somewhere in a file."""
    begin = int(at * len(content))
    end = min(begin + length, len(content))
    if kind == "flip":
        return content[:begin] + bytes([content[begin] ^ 1 << length % 8]) + content[begin + 1 :]
    if kind == "cut":
        return content[:begin]
    if kind == "zero":
        return content[:begin] + bytes(end - begin) + content[end:]
    if kind == "insert":
        return content[:begin] + bytes(length) + content[begin:]
    if kind == "remove":
        return content[:begin] + content[end:]
    return content[:begin] + content[begin:end] + content[begin:]


def damage(tree: dict[str, Any], draw: st.DrawFn | Any) -> dict[str, Any]:
    """One or two kinds of damage to the journal's files."""
    tree = dict(tree)
    for _ in range(draw(st.integers(1, 2))):
        names = sorted(path for path in tree if path.endswith(".journal"))
        if not names:
            break
        kind, name = draw(st.sampled_from(KINDS)), draw(st.sampled_from(names))
        other = draw(st.sampled_from(names))
        if kind == "delete":
            del tree[name]
        elif kind == "exchange":
            tree[name], tree[other] = tree[other], tree[name]
        elif kind == "rename":
            tree[f"{FOLDER}/{draw(st.integers(0, 9))}-0_{draw(st.integers(0, 9))}.journal"] = tree.pop(name)
        elif tree[name]:
            tree[name] = damaged(tree[name], kind, draw(st.floats(0, 0.999)), draw(st.integers(1, 5000)))
    return tree


def check_damaged(run: JournalRun, tree: dict[str, Any]) -> None:
    """What is found is right for the history that it is found in; then it is repaired, and found again."""
    storage = open_storage(SimulatedDisk.of(tree))
    view = read_journal([storage], rank=0, since=step(0))
    if view.header is None:
        assert not view.rollouts
        return
    tip = view.header.identity.incarnation
    for (position, part), place in view.rollouts.items():
        arrays = {name: array.tobytes() for name, array in read_record(place).arrays.items()}
        # A start whose segments are all gone cannot say what it abandoned; its own are gone with it.
        assert arrays == payload_of(run.meant[tip][position, part])
    repair(storage, view)
    again = read_journal([storage], rank=0, since=step(0))
    assert again.rollouts.keys() == view.rollouts.keys()
    assert not {segment.name for segment, _ in again.torn} & {segment.name for segment, _ in view.torn}


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_nothing_damaged_is_handed_out(run: JournalRun, data: st.DataObject) -> None:
    check_damaged(run, damage(run.disk.tree(), data.draw))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=10_000, derandomize=False, suppress_health_check=list(HealthCheck))
def test_nothing_damaged_is_handed_out_ten_thousand_times(run: JournalRun, data: st.DataObject) -> None:
    check_damaged(run, damage(run.disk.tree(), data.draw))


METADATA = st.dictionaries(
    st.sampled_from(["kind", "position", "time", "chunk", "iteration", "prompt_width", "segment", "x"]),
    st.one_of(
        st.sampled_from(
            ["rollouts", "outcome", "event", "segment", "0_5", "0_9", "1", "-1", "9" * 30, "{}", "[]"]
        ),
        st.integers(),
        st.none(),
    ),
)


@given(
    metadata=METADATA,
    tensors=st.dictionaries(
        st.sampled_from(["prompt_of", "loss", "rewards", "completion_lengths"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F64", "I32", "U16", "BOOL", "F4", ""]),
                "shape": st.lists(st.sampled_from([0, 1, 2, 2**62, -1]), max_size=3),
                "data_offsets": st.lists(st.sampled_from([0, 4, 8, 16, 2**62, -8]), min_size=1, max_size=2),
            }
        ),
        max_size=2,
    ),
    data=st.sampled_from([b"", bytes(8), bytes(16)]),
)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_record_with_a_true_digest_and_absurd_content_is_harmless(
    run: JournalRun, metadata: dict[str, Any], tensors: dict[str, Any], data: bytes
) -> None:
    """Digests find damage, not malice: what is forged must end in a reason, never in memory or a crash."""
    header = json.dumps({"__metadata__": metadata, **tensors}).encode()
    payload = len(header).to_bytes(8, "little") + header + data
    tree = dict(run.disk.tree())
    name = max(path for path in tree if path.endswith(".journal"))
    content = tree[name] or b""
    length = int.from_bytes(content[8:16], "little")
    first = content[: FRONT_BYTES + length]
    sequence = int.from_bytes(first[16:20], "little")
    salt = first[24:FRONT_BYTES]
    forged = encode_frame(sequence + 1, 0, payload, salt)
    tree[name] = first + forged
    tree[f"{FOLDER}/9-0_0.journal"] = encode_frame(0, 0, payload, NO_SALT)
    view = read_journal([open_storage(SimulatedDisk.of(tree))], rank=0, since=step(0))
    assert view.problems
    for place in (*view.rollouts.values(), *view.outcomes.values()):
        if place.segment.name.path == name.removeprefix(f"{ROOT}/"):
            for reader in (unpack, unpack_outcome):
                with pytest.raises((ValueError, CheckpointInvalid)):
                    reader(read_record(place))
