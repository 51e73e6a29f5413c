"""The journal gives the trainer back what it had, to the last bit, and notices when a replay differs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from journal_case import SETTINGS, assert_same_chunk, chunk, identity, open_log, outcome, run_step
from lockstep import LockStep
from simulated_disk import SimulatedDisk

from rollforward.errors import ReplayDiverged, StorageError
from rollforward.grpo.addition import share
from rollforward.grpo.types import RolloutChunk
from rollforward.position import Position
from rollforward.replay.codec import pack, pack_outcome, unpack, unpack_outcome
from rollforward.replay.rollout_log import WITHOUT_KL, JournaledRollouts, LogSettings
from rollforward.storage import LocalStorage
from rollforward.store.journal.reading import read_journal
from rollforward.store.journal.records import Record, decode_record, encode_record
from rollforward.store.journal.writing import Journal

START = Position(0, 0)
BIG = 1 << 20


def through_a_record(rollouts: RolloutChunk) -> RolloutChunk:
    arrays, metadata = pack(rollouts)
    return unpack(decode_record(encode_record(Record("rollouts", START, "now", metadata, arrays))))


@given(
    st.integers(0, 1000),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([3, 1 << 16, (1 << 16) + 2, 1 << 18]),
)
def test_chunks_come_back_to_the_last_bit(
    seed: int, prompts: int, generations: int, width: int, length: int, vocabulary: int
) -> None:
    rollouts = chunk(
        seed, prompts=prompts, generations=generations, width=width, length=length, vocabulary=vocabulary
    )
    assert_same_chunk(through_a_record(rollouts), rollouts)


def test_equal_prompts_of_neighbouring_groups_and_all_masks_full_come_back() -> None:
    rollouts = chunk(1)
    ones = np.ones_like(rollouts.tokens.completion_mask)
    tokens = replace(
        rollouts.tokens,
        prompt_ids=np.repeat(rollouts.tokens.prompt_ids[:1], 6, axis=0),
        prompt_mask=np.ones((6, 5), dtype=np.bool_),
        completion_mask=ones,
    )
    full = replace(rollouts, tokens=tokens, reference_logprobs=-ones.astype(np.float32))
    assert_same_chunk(through_a_record(full), full)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.tokens.prompt_mask.__setitem__((0, slice(None)), [1, 1, 0, 1, 1]), "not left-padded"),
        (lambda c: c.tokens.completion_mask.__setitem__((0, slice(2)), [0, 1]), "not right-padded"),
        (lambda c: c.reference_logprobs.__setitem__((0, -1), -0.0), "is not 0"),
        (lambda c: c.tokens.completion_ids.__setitem__((0, -1), 7), "more than one value"),
    ],
)
def test_what_would_not_come_back_is_refused(spoil: Callable[[RolloutChunk], None], message: str) -> None:
    rollouts = chunk(2, prompts=3, length=20)
    rollouts.tokens.completion_mask[0, 3:] = False
    rollouts.tokens.completion_ids[0, 3:] = 0
    rollouts.reference_logprobs[0, 3:] = 0
    spoil(rollouts)
    with pytest.raises(ValueError, match=message):
        pack(rollouts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arrays": {"prompt_of": np.array([0, 0, 0, 1, 1, 99], np.int32)}},
            "prompt_of are not all from 0 to 1",
        ),
        (
            {"arrays": {"completion_lengths": np.full(6, BIG, np.int32)}},
            "completion_lengths are not all from 1 to 7",
        ),
        (
            {"arrays": {"completion_lengths": np.full(6, -1, np.int32)}},
            "completion_lengths are not all from 1 to 7",
        ),
        ({"arrays": {"prompt_of": np.array([0, 0, 0, 1, 1, -1], np.int32)}}, "prompt_of are not all from 0"),
        ({"arrays": {"prompt_indices": np.zeros(2, np.int32)}}, "6 samples, and 2 of prompt_indices"),
        ({"arrays": {"stopped": np.zeros(6, np.float32)}}, "stopped is float32"),
        ({"arrays": {"rewards": np.zeros(6, np.float32)}}, "rewards is float32"),
        ({"arrays": {"rewards": np.full((6, 2), np.nan, np.float32)}}, "rewards are not all finite"),
        ({"metadata": {"completion_pad": str(1 << 40)}}, "completion_pad is not a token id"),
        ({"arrays": {"completion_ids": np.zeros(3, np.uint16)}}, "completion_ids are not as many"),
        ({"metadata": {"completion_width": str(1 << 40)}}, "6 samples of 1099511627776 tokens"),
        ({"metadata": {"prompt_width": "1"}}, "prompt_lengths are not all from 1 to 1"),
        ({"metadata": {"prompt_pad": "-1"}}, "prompt_pad is not a count"),
        ({"missing": "rewards"}, "not a record of rollouts: its arrays are"),
    ],
)
def test_a_record_that_holds_no_rollouts_is_refused_before_memory_is_taken(
    change: dict[str, Any], message: str
) -> None:
    arrays, metadata = pack(chunk(3, width=9))
    arrays |= change.get("arrays", {})
    metadata |= change.get("metadata", {})
    arrays.pop(change.get("missing", ""), None)
    with pytest.raises(ValueError, match=message):
        unpack(Record("rollouts", START, "now", metadata, arrays))


@given(st.floats(allow_nan=False), st.floats(allow_nan=False), st.floats(allow_nan=False), st.floats(0, 1))
def test_outcomes_come_back_to_the_last_bit(loss: float, norm: float, kl: float, rate: float) -> None:
    given_outcome = replace(outcome(1), loss=loss, grad_norm=norm, kl=kl)
    arrays, metadata = pack_outcome(given_outcome, rate, "weights")
    found = unpack_outcome(decode_record(encode_record(Record("outcome", START, "now", metadata, arrays))))
    assert np.array([found.loss, found.grad_norm, found.kl, found.learning_rate]).tobytes() == (
        np.array([loss, norm, kl, rate]).tobytes()
    )
    assert found.weights == "weights"


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def recorded(storage: LocalStorage, **about: Any) -> None:
    """A start that did step 0_0."""
    log, _ = open_log(storage, 1, START, **about)
    run_step(log, START)
    log.journal.close()


def replaying(storage: LocalStorage, **options: Any) -> JournaledRollouts:
    return open_log(storage, 2, START, (1, START), **options)[0]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "kl"])
def test_one_bit_of_difference_is_a_divergence(storage: LocalStorage, name: str) -> None:
    recorded(storage)
    log = replaying(storage)
    value = getattr(outcome(0), name)
    other = replace(outcome(0), **{name: float(np.nextafter(value, 2))})
    with pytest.raises(ReplayDiverged) as raised:
        log.record(START, 0, other, 1e-3)
    assert "step 0_0, update 0" in raised.value.message
    assert repr(value) in raised.value.message
    assert repr(getattr(other, name)) in raised.value.message
    assert "versions, device and world size are those of the recording" in raised.value.message
    assert "--on_divergence accept" in (raised.value.hint or "")


def test_another_learning_rate_is_a_divergence(storage: LocalStorage) -> None:
    recorded(storage)
    with pytest.raises(ReplayDiverged, match=r"learning_rate 0\.002 where 0\.001"):
        replaying(storage).record(START, 0, outcome(0), 2e-3)


def test_zero_and_minus_zero_are_not_the_same_bits(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    log.record(START, 0, replace(outcome(0), kl=0.0), 1e-3)
    with pytest.raises(ReplayDiverged, match=r"kl -0\.0 where 0\.0"):
        replaying(storage).record(START, 0, replace(outcome(0), kl=-0.0), 1e-3)


def test_other_versions_are_compared_with_a_tolerance_and_said_so(storage: LocalStorage) -> None:
    recorded(storage)
    said: list[str] = []
    log = replaying(storage, versions={"numpy": "1.27"}, device="Ascend", notice=said.append)
    near = replace(outcome(0), loss=outcome(0).loss * (1 + 1e-5))
    log.record(START, 0, near, 1e-3)
    assert (log.replayed_updates, log.repeated_updates) == (1, 0)
    assert "within tolerance, with numpy 1.27 instead of 1.26; device Ascend instead of CPU" in said[0]
    far = replace(outcome(0), loss=outcome(0).loss * 1.1)
    with pytest.raises(ReplayDiverged, match=r"numpy 1\.27 instead of 1\.26"):
        log.record(START, 0, far, 1e-3)


def test_an_accepted_divergence_is_what_later_replays_are_held_against(storage: LocalStorage) -> None:
    recorded(storage)
    said: list[str] = []
    accepting = replace(SETTINGS, on_divergence="accept")
    log = replaying(storage, settings=accepting, notice=said.append)
    log.record(START, 0, outcome(99), 1e-3)
    assert "continues as configured" in said[0]
    log, _ = open_log(storage, 3, START, (1, START))
    log.record(START, 0, outcome(99), 1e-3)
    with pytest.raises(ReplayDiverged):
        log.record(START, 0, outcome(0), 1e-3)


def test_without_a_kl_term_records_of_a_version_that_measured_the_kl_are_repeated(
    storage: LocalStorage,
) -> None:
    recorded(storage)
    assert outcome(0).kl > 0
    without = replace(outcome(0), kl=0.0)
    with pytest.raises(ReplayDiverged, match="kl"):
        replaying(storage).record(START, 0, without, 1e-3)
    log, _ = open_log(storage, 3, START, (1, START), settings=replace(SETTINGS, compared=WITHOUT_KL))
    log.record(START, 0, without, 1e-3)


def test_a_digest_of_the_weights_finds_what_the_loss_does_not_show(storage: LocalStorage) -> None:
    settings = LogSettings(chunks_per_step=1, steps_per_epoch=10, weights_digest_every=2)
    log, _ = open_log(storage, 1, START, settings=settings, weights_digest=lambda: "aa")
    for number in range(2):
        log.append(Position(0, number), 0, chunk(number))
        log.record(Position(0, number), 0, outcome(number), 1e-3)
    log = replaying(storage, settings=settings, weights_digest=lambda: "bb")
    log.record(START, 0, outcome(0), 1e-3)
    with pytest.raises(ReplayDiverged, match="weights 'bb' where 'aa'"):
        log.record(Position(0, 1), 0, outcome(1), 1e-3)


def test_a_chunk_that_is_spoilt_after_the_journal_was_opened_is_counted_and_left_out(
    storage: LocalStorage, tmp_path: Path
) -> None:
    recorded(storage)
    said: list[str] = []
    log = replaying(storage, notice=said.append)
    place = log.journal.inherited.rollouts[START, 1]
    path = tmp_path / place.segment.name.path
    content = bytearray(path.read_bytes())
    content[place.offset + 100] ^= 1
    path.write_bytes(content)
    assert log.find(START, 0) is not None
    assert log.find(START, 1) is None
    assert log.unreadable_chunks == 1
    assert "step 0_0, chunk 1 is generated again" in said[0]


def test_an_outcome_that_was_lost_is_recorded_again(storage: LocalStorage) -> None:
    log, _ = open_log(storage, 1, START)
    log.append(START, 0, chunk(0))
    log.append(START, 1, chunk(1))
    log = replaying(storage)
    run_step(log, START)
    log, _ = open_log(storage, 3, START, (1, START))
    with pytest.raises(ReplayDiverged):
        log.record(START, 0, outcome(1), 1e-3)


def two_ranks(work: Callable[[int, Callable[[Any], list[Any]]], Any]) -> list[Any]:
    return LockStep(2).run(work)


def recorded_by_two(disk: SimulatedDisk, steps: tuple[int, int]) -> None:
    """A start of two ranks with a chunk each, of which one came further than the other."""

    def work(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
        storage = LocalStorage("/run", disk)
        log, _ = open_log(storage, 1, START, all_gather=exchange, rank=rank, world_size=2)
        for number in range(steps[rank]):
            if number < min(steps):
                run_step(log, Position(0, number), chunks=[rank])
            else:
                log.append(Position(0, number), rank, chunk(10 * number + rank))

    assert two_ranks(work) == [None, None]


def test_ranks_agree_on_the_step_up_to_which_they_replay() -> None:
    disk = SimulatedDisk()
    recorded_by_two(disk, (3, 4))

    def second(rank: int, exchange: Callable[[Any], list[Any]]) -> Any:
        storage = LocalStorage("/run", disk)
        log, report = open_log(storage, 2, START, (1, START), all_gather=exchange, rank=rank, world_size=2)
        return report, [log.find(Position(0, step), rank) is not None for step in range(5)]

    (report, own), (other, others) = two_ranks(second)
    assert report.until == other.until == Position(0, 3)
    assert report.replayed_chunks == other.replayed_chunks == 6
    assert report.reused_chunks == other.reused_chunks == 1
    assert own == [True] * 3 + [False] * 2
    assert others == [True] * 4 + [False]


def test_one_rank_takes_over_what_two_have_done() -> None:
    disk = SimulatedDisk()
    recorded_by_two(disk, (3, 4))
    said: list[str] = []
    log, report = open_log(LocalStorage("/run", disk), 2, START, (1, START), notice=said.append)
    assert (report.compatible, report.until, report.lost_chunks) == (True, Position(0, 3), 0)
    assert (report.replayed_chunks, report.reused_chunks) == (6, 1)
    for step in range(3):
        assert_same_chunk(log.find(Position(0, step), 1), chunk(10 * step + 1))
        run_step(log, Position(0, step))
    assert (log.replayed_updates, log.repeated_updates, said) == (3, 3, [])
    assert log.find(Position(0, 3), 0) is None
    assert log.find(Position(0, 3), 1) is not None


def test_two_ranks_take_over_what_one_has_done_and_each_proves_it() -> None:
    disk = SimulatedDisk()
    storage = LocalStorage("/run", disk)
    log, _ = open_log(storage, 1, START)
    for step in range(2):
        run_step(log, Position(0, step))
    log.append(Position(0, 2), 0, chunk(20))

    def work(rank: int, exchange: Callable[[Any], list[Any]]) -> Any:
        own = LocalStorage("/run", disk)
        log, report = open_log(own, 2, START, (1, START), all_gather=exchange, rank=rank, world_size=2)
        with pytest.raises(ReplayDiverged):
            log.record(START, 0, outcome(7), 1e-3)
        for step in range(2):
            run_step(log, Position(0, step), chunks=[rank])
        return report, log.repeated_updates, log.find(Position(0, 2), rank) is not None

    (report, repeated, reused), (other, repeated_too, generated) = two_ranks(work)
    assert report.until == other.until == Position(0, 2)
    assert (report.replayed_chunks, report.reused_chunks, report.lost_chunks) == (4, 1, 0)
    assert (repeated, repeated_too, reused, generated) == (2, 2, True, False)


def test_what_three_starts_on_two_one_and_two_ranks_did_is_one_history() -> None:
    """Each chunk counts, whichever folder holds it; where two do, the newer start's."""
    disk = SimulatedDisk()
    recorded_by_two(disk, (2, 1))
    log, _ = open_log(LocalStorage("/run", disk), 2, START, (1, START))
    for step in range(3):
        run_step(log, Position(0, step))
    log.journal.close()

    def third(rank: int, exchange: Callable[[Any], list[Any]]) -> Any:
        own = LocalStorage("/run", disk)
        log, report = open_log(own, 3, START, (1, START), all_gather=exchange, rank=rank, world_size=2)
        for step in range(3):
            assert_same_chunk(log.find(Position(0, step), rank), chunk(10 * step + rank))
        return report.until, report.lost_chunks, log.journal.inherited.lineage

    until, lost, lineage = two_ranks(third)[0]
    assert (until, lost) == (Position(0, 3), 0)
    assert set(lineage) == {1, 2}


@pytest.mark.parametrize("world_size", [1, 3, 6])
def test_a_journal_of_version_1_counts_with_the_numbers_of_the_step(world_size: int) -> None:
    """Two workers numbered their three chunks 0, 1, 2 each."""
    disk = SimulatedDisk()
    for rank in range(2):
        old = old_journal(LocalStorage("/run", disk), rank)
        for number in range(3):
            arrays, metadata = pack(chunk(10 * rank + number))
            old.append(START, number, arrays, metadata)
        old.record(START, 0, *pack_outcome(outcome(0), 1e-3, ""))
        old.close()
    settings = LogSettings(chunks_per_step=6, steps_per_epoch=10)

    def work(rank: int, exchange: Callable[[Any], list[Any]]) -> Any:
        about = {"rank": rank, "world_size": world_size, "all_gather": exchange, "settings": settings}
        log, report = open_log(LocalStorage("/run", disk), 2, START, (1, START), **about)
        log.record(START, 0, outcome(0), 1e-3)
        found = {number: log.find(START, number) for number in share(6, world_size, rank)}
        return report, log.repeated_updates, found

    chunks: dict[int, Any] = {}
    for report, repeated, found in LockStep(world_size).run(work):
        assert (report.until, repeated, report.replayed_chunks) == (Position(0, 1), 1, 6)
        chunks |= found
    for number in range(6):
        assert_same_chunk(chunks[number], chunk(10 * (number // 3) + number % 3))


def old_journal(storage: LocalStorage, rank: int) -> Journal:
    """As version 1 wrote it: nothing in its first record says of how many chunks a step is."""
    nothing = read_journal([storage], rank=rank, since=START)
    return Journal(storage, identity(1, rank=rank, world_size=2), start=START, inherited=nothing)


def test_a_rank_that_cannot_write_its_journal_stops_all() -> None:
    disk = SimulatedDisk()

    def fail(call: str, path: str) -> None:
        if call == "create" and "rank_1" in path:
            raise OSError(28, "No space left on device")

    disk.fail = fail

    def work(rank: int, exchange: Callable[[Any], list[Any]]) -> None:
        open_log(LocalStorage("/run", disk), 1, START, all_gather=exchange, rank=rank, world_size=2)

    results = two_ranks(work)
    assert all(isinstance(result, StorageError) for result in results)
    assert "rank 1: creating" in results[0].message
    assert "the disk is full" in (results[1].hint or "")
