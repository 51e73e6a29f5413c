"""Tensors in pieces: cut anyhow over any number of ranks, saved, and read back cut anyhow else."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from cuttings import boxes_in, cuttings
from held import Holding, layout, spread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lockstep import LockStep
from simulated_disk import SimulatedDisk

import rollforward.boxes as boxes_module
from rollforward.boxes import Box, blocks, cut_rows, intersection, whole, within
from rollforward.errors import CheckpointInvalid, CheckpointMismatch, EngineError
from rollforward.inspection.comparing import diff
from rollforward.interop.exporting import export_huggingface
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import (
    CheckpointStore,
    check_layout,
    find,
    list_checkpoints,
    read_boxes,
    read_tensors,
    restore_into,
)
from rollforward.store.contents import read_table
from rollforward.store.covering import PRIME, mark
from rollforward.store.restoring import content_digests, verify
from rollforward.store.sealing import own_digest
from rollforward.store.table import dump as dump_table
from rollforward.store.table import make as make_table
from rollforward.tensors import Piece, TensorSpec

ROLES = ("policy_model", "optimizer")
DTYPES = [np.float32, np.int64, np.bool_, ml_dtypes.bfloat16, np.complex64]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that tensors of a test have several."""
    monkeypatch.setattr(boxes_module, "BLOCK_BYTES", 24)


def disk():
    return LocalStorage("/run", SimulatedDisk())


def filled(shape, dtype, seed):
    data = np.random.default_rng(seed).integers(
        0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8
    )
    return (data % 2 if dtype is np.bool_ else data).view(dtype).reshape(shape)


def save(storage, state, holdings, step=1, **options):
    """Save by all ranks, each with its own pieces; the manifest."""

    def work(rank, exchange):
        store = CheckpointStore(storage, rank=rank, world_size=len(holdings), exchange=exchange, **options)
        live = Holding(state, rank, holdings[rank])
        about = {"global_step": step, "run_id": "r", "incarnation": 1, "state": {}}
        return store.save(Position(0, step), live, **about).manifest

    results = LockStep(len(holdings)).run(work)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results[0]


def dealt(draw, state, world_size):
    """Every tensor cut anyhow and its pieces dealt to the ranks anyhow; some tensors stay whole."""
    holdings = [{role: {} for role in state} for _ in range(world_size)]
    for role, named in state.items():
        for tensor, array in named.items():
            if draw(st.integers(0, 3)) == 0:
                continue
            _, pieces = draw(cuttings(array.shape))
            for holding in holdings:
                holding[role][tensor] = []
            for piece in pieces:
                mine = holdings[draw(st.integers(0, world_size - 1))][role][tensor]
                mine.append((f"{tensor}/{len(mine)}" if mine else tensor, piece))
    return holdings


@st.composite
def states(draw):
    return {
        role: {
            f"t{number}": filled(draw(cuttings())[0], draw(st.sampled_from(DTYPES)), number)
            for number in range(draw(st.integers(0, 3)))
        }
        for role in ROLES
    }


def wanted(draw, state, role, tensor):
    shape = state[role][tensor].shape
    return draw(st.one_of(boxes_in(shape), st.just(whole(shape))))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_cutting_over_any_ranks_is_read_back_in_any_other(data):
    state = data.draw(states())
    storage = disk()
    manifest = save(storage, state, dealt(data.draw, state, data.draw(st.integers(1, 4))))
    found = {(role, name): array for role, name, array in read_tensors(storage, manifest)}
    assert found.keys() == {(role, name) for role, named in state.items() for name in named}
    for (role, name), array in found.items():
        assert (array.dtype, array.shape) == (state[role][name].dtype, state[role][name].shape)
        assert array.tobytes() == state[role][name].tobytes()
    verify(storage, find(storage).manifest)
    for rank in range(data.draw(st.integers(1, 3))):
        boxes = {
            role: {name: [(f"{name}*", wanted(data.draw, state, role, name))] for name in named}
            for role, named in state.items()
        }
        asked = layout(state, boxes)
        check_layout(storage, manifest, asked)
        expected = Holding(state, 0, boxes).tensors()
        into = {
            role: {name: np.zeros(spec.shape, spec.dtype) for name, spec in named.items()}
            for role, named in asked.items()
        }
        restore_into(storage, manifest, into, asked, near=rank)
        read = {(role, name): array for role, name, array in read_boxes(storage, manifest, asked, near=rank)}
        for role, named in expected.items():
            for name, array in named.items():
                assert into[role][name].tobytes() == array.tobytes()
                assert read[role, name].tobytes() == array.tobytes()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_only_the_blocks_that_are_wanted_are_read(data):
    shape, pieces = data.draw(cuttings())
    state = {"policy_model": {"w": filled(shape, np.float32, 1)}}
    ranks = data.draw(st.integers(1, 3))
    holdings = [
        {"policy_model": {"w": [(f"w{n}", piece) for n, piece in enumerate(pieces) if n % ranks == rank]}}
        for rank in range(ranks)
    ]
    storage = disk()
    manifest = save(storage, state, holdings)
    box = data.draw(boxes_in(shape))
    spec = TensorSpec.piece("w", np.float32, shape, box)
    into = {"policy_model": {"w": np.zeros(box.shape, np.float32)}}
    touched = [
        block for piece in pieces for block in blocks(piece, 4) if intersection(block, box) is not None
    ]
    read = restore_into(storage, manifest, into, {"policy_model": {"w": spec}})
    assert read == sum(4 * block.size for block in touched)
    assert (
        into["policy_model"]["w"].tobytes() == state["policy_model"]["w"][within(box, whole(shape))].tobytes()
    )


def reads(storage, work):
    """The paths that are opened while something is done."""
    paths = set()
    real = storage._ops.open_read

    def noting(path):
        paths.add(path.removeprefix("/run/"))
        return real(path)

    storage._ops.open_read = noting
    work()
    storage._ops.open_read = real
    return paths


def grid():
    """A tensor of 8 x 4 in rows over four ranks, one whole, and the holdings."""
    state = {
        "policy_model": {"w": np.arange(8.0, dtype=np.float32)},
        "optimizer": {"m": np.arange(32.0).reshape(8, 4), "step": np.array(3)},
    }
    rows = cut_rows((8, 4), 4)
    return state, [{"optimizer": {"m": [("m", rows[rank])]}} for rank in range(4)]


def test_a_rank_that_resumes_as_it_was_reads_its_own_table_and_file():
    state, holdings = grid()
    storage = disk()
    manifest = save(storage, state, holdings)
    asked = {"optimizer": {"m": layout(state, holdings[2])["optimizer"]["m"]}}
    into = {"optimizer": {"m": np.zeros((2, 4))}}
    assert reads(storage, lambda: restore_into(storage, manifest, into, asked, near=2)) == {
        "tables/rank_2/table_rank_2-0_1.json",
        "optimizer/rank_2/optimizer_rank_2-0_1.safetensors",
    }
    assert np.array_equal(into["optimizer"]["m"], state["optimizer"]["m"][4:6])


def test_each_piece_is_a_plain_tensor_in_its_rank_s_file(tmp_path):
    state, holdings = grid()
    storage = LocalStorage(tmp_path)
    manifest = save(storage, state, holdings)
    for file in manifest.files:
        found = safetensors.numpy.load_file(tmp_path / file.path)
        rank = int(file.path.split("/")[1][5:])
        if file.path.startswith("optimizer"):
            assert np.array_equal(found["m"], state["optimizer"]["m"][2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("place", range(5))
def test_a_damaged_piece_is_named_and_its_checkpoint_rejected(place):
    state, holdings = grid()
    storage = disk()
    save(storage, state, holdings, step=1)
    manifest = save(storage, state, holdings, step=2)
    path = "optimizer/rank_1/optimizer_rank_1-0_2.safetensors"
    content = bytearray(storage._ops.tree()[f"/run/{path}"])
    content[-1 - 12 * place] ^= 1
    storage.write(path, [content])
    asked = layout(state, {"optimizer": {"m": [("m", Box((1, 0), (6, 4)))]}})
    into = {
        role: {name: np.zeros(spec.shape, spec.dtype) for name, spec in named.items()}
        for role, named in asked.items()
    }
    for look in (
        lambda: verify(storage, manifest),
        lambda: list(read_tensors(storage, manifest)),
        lambda: list(read_boxes(storage, manifest, asked)),
        lambda: restore_into(storage, manifest, into, asked),
    ):
        with pytest.raises(
            CheckpointInvalid, match=rf"{path}: tensor '(m|step)' does not have its recorded digest"
        ):
            look()
    newest, older = list_checkpoints(storage, deep=True)
    assert (newest.valid, older.valid) == (False, True)
    assert path in newest.reason


@pytest.mark.parametrize("name", ["gone", "cut short", "of another checkpoint", "flipped"])
def test_a_damaged_table_is_named_and_its_checkpoint_rejected(name):
    state, holdings = grid()
    storage = disk()
    save(storage, state, holdings, step=1)
    state["policy_model"]["w"] += 1
    manifest = save(storage, state, holdings, step=2)
    path = "tables/rank_3/table_rank_3-0_2.json"
    content = bytearray(storage._ops.tree()[f"/run/{path}"])
    if name == "gone":
        storage.remove(path)
    elif name == "cut short":
        storage.write(path, [content[:-1]])
    elif name == "of another checkpoint":
        storage.write(path, [storage._ops.tree()["/run/tables/rank_3/table_rank_3-0_1.json"]])
    else:
        content[70] ^= 1
        storage.write(path, [content])
    with pytest.raises(CheckpointInvalid, match=path):
        list(read_tensors(storage, manifest))
    newest, older = list_checkpoints(storage, deep=True)
    assert (newest.valid, older.valid) == (False, True)
    assert path in newest.reason


@settings(max_examples=100, deadline=None)
@given(cuttings(), st.data())
def test_the_marks_of_pieces_add_up_to_nothing_exactly_where_they_cover_their_tensor_evenly(cutting, data):
    shape, pieces = cutting
    pieces = list(pieces)
    number = data.draw(st.integers(0, len(pieces) - 1))
    match data.draw(st.sampled_from(["keep", "drop", "double", "replace"])):
        case "drop":
            del pieces[number]
        case "double":
            pieces.append(pieces[number])
        case "replace":
            pieces[number] = data.draw(boxes_in(shape))
    total = sum(mark("optimizer", "m", "F32", shape, piece) for piece in pieces)
    counts = np.zeros(shape, int)
    for piece in pieces:
        counts[within(piece, whole(shape))] += 1
    assert (total % PRIME == 0) == (counts.min() == counts.max())


def test_two_ranks_that_both_hold_all_of_a_tensor_are_refused_and_nothing_is_committed():
    state, holdings = grid()
    save(storage := disk(), state, holdings)
    for holding in holdings:
        holding["optimizer"]["m"] = []
    halves = cut_rows((8, 4), 2)
    holdings[0]["optimizer"]["m"] = [("m", halves[0]), ("rest", halves[1])]
    holdings[3]["optimizer"]["m"] = [("m", whole((8, 4)))]
    before = storage._ops.tree()
    with pytest.raises(EngineError, match=r"0_2 was not saved: optimizer m: the pieces .* overlap"):
        save(storage, state, holdings, step=2)
    assert storage._ops.tree() == before


@pytest.mark.parametrize("twice", [False, True])
def test_a_tensor_that_is_held_twice_or_not_wholly_is_found_in_tables_that_say_so(twice):
    """As nobody writes them."""
    state, holdings = grid()
    storage = disk()
    manifest = save(storage, state, holdings)
    table = read_table(storage, manifest, 1)
    m = next(piece for piece in table.pieces if piece.tensor == "m")
    others = [piece for piece in table.pieces if piece.tensor != "m"]
    moved = replace(m, offset=(0, 0) if twice else (1, 0))
    content = dump_table(make_table(1, table.position, table.files, [*others, moved]))
    storage.write("tables/rank_1/table_rank_1-0_1.json", [content])
    ranks = list(manifest.ranks)
    ranks[1] = ranks[1]._replace(size=len(content), digest=own_digest(content))
    forged = replace(manifest, ranks=tuple(ranks))
    for look in (verify, lambda *what: list(read_tensors(*what))):
        with pytest.raises(CheckpointInvalid, match=r"checkpoint 0_1: optimizer m: .* overlap"):
            look(storage, forged)


def spoilt(change):
    state, holdings = grid()
    change(holdings)
    return state, holdings


def put(rank, box):
    return lambda holdings: holdings[rank]["optimizer"].__setitem__("m", [("m", box)])


SPOILT = {
    "a piece missing": (lambda h: h[2]["optimizer"].__setitem__("m", []), "8 of 32 elements are in no piece"),
    "the first piece missing": (put(0, Box((1, 0), (1, 4))), "4 of 32 elements are in no piece"),
    "two ranks with the same piece": (put(2, Box((2, 0), (2, 4))), r"\[2, 4\] at \[2, 0\] and .* overlap"),
    "pieces that overlap": (put(2, Box((3, 0), (3, 4))), "overlap"),
    "a piece of a whole tensor": (
        lambda h: h[1]["optimizer"].pop("m"),
        r"ranks 0 and 1 do not hold the same roles and whole tensors; .*\['optimizer', 'm', 'F64'",
    ),
}


@pytest.mark.parametrize("why", SPOILT)
def test_pieces_that_do_not_fit_together_are_refused_on_all_ranks_before_anything_is_written(why):
    change, message = SPOILT[why]
    state, holdings = spoilt(change)
    storage = disk()
    before = storage._ops.tree()

    def work(rank, exchange):
        store = CheckpointStore(storage, rank=rank, world_size=4, exchange=exchange)
        about = {"global_step": 1, "run_id": "r", "incarnation": 1, "state": {}}
        store.save(Position(0, 1), Holding(state, rank, holdings[rank]), **about)

    errors = LockStep(4).run(work)
    assert all(isinstance(error, EngineError) for error in errors), errors
    assert len({error.message for error in errors}) == 1
    with pytest.raises(EngineError, match=message):
        raise errors[0]
    assert storage._ops.tree() == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec.piece("m", np.float32, (4, 4), Box((2, 0), (3, 4))), r"\[3, 4\] at \[2, 0\] is not in"),
        (TensorSpec.piece("m", np.float32, (4, 4), Box((-1, 0), (3, 4))), r"at \[-1, 0\] is not in"),
        (TensorSpec.piece("m", np.float32, (4, 4), Box((0,), (4, 4))), "different numbers of axes"),
        (TensorSpec.piece("w", np.float32, (4,), Box((0,), (4,))), "is a piece of w, which is whole"),
        (TensorSpec(np.dtype(np.float32), (2, 4), (4, 4), (0, 0)), "not said to be a piece"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(spec, message):
    held = {"policy_model": {"w": TensorSpec.whole(np.float32, (4,)), "x": spec}}
    store = CheckpointStore(disk())
    with pytest.raises(ValueError, match=message):
        store.plan(None or _description(), held)


def _description():
    from rollforward.store.saved import About

    return About(run_id="r", incarnation=1, state={}).at(Position(0, 1), 1)


def test_digests_are_those_of_the_content_however_it_is_cut():
    state, holdings = grid()
    found = []
    for cut in (holdings, [{}], [{}, {}], [spread(state, rank, 3, ["optimizer"]) for rank in range(3)]):
        storage = disk()
        manifest = save(storage, state, cut)
        found.append((content_digests(storage, manifest), manifest.role_digests()))
    contents, recorded = zip(*found, strict=True)
    assert all(one == contents[0] for one in contents)
    assert contents[1] == recorded[1] == recorded[2], "of tensors that are not cut, the recorded one is it"
    grain = boxes_module.block_rows((8, 4), 8)
    aligned = [{"optimizer": {"m": [("m", box)]}} for box in cut_rows((8, 4), 3, grain=grain)]
    assert save(disk(), state, aligned).role_digests() == recorded[1], "cut between blocks it is too"
    state["optimizer"]["m"][7, 3] += 1
    storage = disk()
    other = content_digests(storage, save(storage, state, holdings))
    assert other["policy_model"] == contents[0]["policy_model"]
    assert other["optimizer"] != contents[0]["optimizer"]


def test_a_difference_is_one_of_content():
    state, holdings = grid()
    one, other = disk(), disk()
    first = save(one, state, holdings)
    assert diff(one, first, other, save(other, state, [{}])) == []
    state["optimizer"]["m"][5, 1] += 0.5
    (found,) = diff(one, first, other, save(other, state, [spread(state, 0, 1, ["optimizer"])], step=2))
    assert (found.role, found.name, found.what, found.elements, found.largest) == (
        "optimizer",
        "m",
        "values",
        1,
        0.5,
    )


def test_a_model_in_pieces_is_exported_whole(tmp_path):
    state, _ = grid()
    storage, out, other = disk(), LocalStorage(tmp_path / "a"), LocalStorage(tmp_path / "b")
    pieces = [spread(state, rank, 3, ["policy_model"]) for rank in range(3)]
    export_huggingface(storage, save(storage, state, pieces), out)
    storage = disk()
    export_huggingface(storage, save(storage, state, [{}]), other)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_role_in_pieces_that_has_not_changed_is_not_written_again():
    state, holdings = grid()
    storage = disk()

    def work(rank, exchange):
        store = CheckpointStore(storage, rank=rank, world_size=4, exchange=exchange)
        about = {"run_id": "r", "incarnation": 1, "state": {}}
        for step in (1, 2):
            state["policy_model"]["w"][...] = step
            store.save(Position(0, step), Holding(state, rank, holdings[rank]), global_step=step, **about)
        exchange(None)
        if rank == 3:
            # A cut of the same size at another place is another piece.
            holdings[3]["optimizer"]["m"], holdings[2]["optimizer"]["m"] = (
                holdings[2]["optimizer"]["m"],
                holdings[3]["optimizer"]["m"],
            )
        exchange(None)
        store.save(Position(0, 3), Holding(state, rank, holdings[rank]), global_step=3, **about)

    assert LockStep(4).run(work) == [None] * 4
    written = {
        item.position.step: item.manifest.roles["optimizer"].position.step
        for item in list_checkpoints(storage, deep=True)
    }
    assert written == {1: 1, 2: 1, 3: 3}


def test_another_model_is_told_tensor_by_tensor_from_any_cut():
    state, holdings = grid()
    storage = disk()
    manifest = save(storage, state, holdings)
    check_layout(storage, manifest, layout(state, holdings[1]))
    check_layout(storage, manifest, layout(state, {}))
    wrong = layout(state, holdings[1])
    wrong["optimizer"]["m"] = TensorSpec.piece("m", np.float64, (9, 4), Box((2, 0), (2, 4)))
    wrong["optimizer"]["v"] = TensorSpec.piece("v", np.float64, (9, 4), Box((2, 0), (2, 4)))
    wrong["policy_model"] = {}
    with pytest.raises(CheckpointMismatch) as caught:
        check_layout(storage, manifest, wrong)
    for line in (
        "not in the checkpoint: optimizer v",
        r"optimizer m: F64 [8, 4] in the checkpoint, F64 [9, 4] in the model",
        "only in the checkpoint: policy_model w",
    ):
        assert line in caught.value.message


def test_arrays_may_be_given_as_pieces():
    storage = disk()
    m = np.arange(6.0).reshape(3, 2)

    def work(rank, exchange):
        store = CheckpointStore(storage, rank=rank, world_size=2, exchange=exchange)
        mine = slice(rank, 1 + 2 * rank)
        held = {"optimizer": {"m": Piece(m[mine], (3, 2), (rank, 0)), "step": np.array(1)}}
        about = {"global_step": 1, "run_id": "r", "incarnation": 1, "state": {}}
        return store.save(Position(0, 1), held, **about).manifest

    manifest, _ = LockStep(2).run(work)
    found = {name: array for _, name, array in read_tensors(storage, manifest)}
    assert np.array_equal(found["m"], m)
    assert found["step"] == 1


def test_what_ranks_exchange_does_not_depend_on_their_number():
    """Counted in the numbers that a rank passes to the AllReduce; nothing is gathered."""
    passed = {}
    for world_size in (1, 2, 8):
        state = {
            "policy_model": {f"w{number}": np.ones(4) for number in range(8)},
            "optimizer": {"m": np.arange(64.0).reshape(64, 1)},
        }
        rows = cut_rows((64, 1), world_size)
        storage = disk()
        counts = passed[world_size] = []

        def work(rank, exchange, counts=counts, rows=rows, state=state, storage=storage, size=world_size):
            def all_sum(numbers):
                if rank == 0:
                    counts.append(len(numbers))
                return [sum(each) for each in zip(*exchange(list(numbers)), strict=True)]

            def gather(value):
                raise AssertionError(f"gathered: {value}")

            store = CheckpointStore(storage, rank=rank, world_size=size, exchange=gather, all_sum=all_sum)
            about = {"run_id": "r", "incarnation": 1, "state": {}}
            for step in (1, 2):
                changed = {name: array * step for name, array in state["policy_model"].items()}
                live = Holding(
                    state | {"policy_model": changed}, rank, {"optimizer": {"m": [("m", rows[rank])]}}
                )
                store.save(Position(0, step), live, global_step=step, **about)

        assert LockStep(world_size).run(work) == [None] * world_size
        verify(storage, find(storage).manifest)
    assert passed[1] == passed[2] == passed[8]


class Copies(Holding):
    """A `Holding` whose pieces other ranks hold alike; `copy`: which of how many this rank is."""

    copy = (0, 1)

    def layout(self):
        return {
            role: {n: replace(spec, copy=self.copy) if spec.piece_of else spec for n, spec in named.items()}
            for role, named in super().layout().items()
        }


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_pieces_that_several_ranks_hold_alike_are_stored_once_and_each_rank_writes_a_share(copies):
    state = {"policy_model": {f"t{n}": filled((8, 6), np.float32, n) for n in range(6)}, "optimizer": {}}
    parts = [Box((0, 0), (8, 3)), Box((0, 3), (8, 3))]
    held = [
        {"policy_model": {tensor: [(tensor, part)] for tensor in state["policy_model"]}, "optimizer": {}}
        for part in parts
    ]
    storage, world_size = disk(), 2 * copies

    def work(rank, exchange):
        live = Copies(state, rank, held[rank % 2])
        live.copy = (rank // 2, copies)
        store = CheckpointStore(storage, rank=rank, world_size=world_size, exchange=exchange)
        about = {"global_step": 1, "run_id": "r", "incarnation": 1, "state": {}}
        return store.save(Position(0, 1), live, **about).manifest

    manifests = LockStep(world_size).run(work)
    assert not any(isinstance(each, BaseException) for each in manifests), manifests
    manifest = manifests[0]
    assert [len(read_table(storage, manifest, rank).pieces) for rank in range(world_size)] == (
        [6 // copies] * world_size
    )
    verify(storage, manifest)
    for role, name, array in read_tensors(storage, manifest):
        assert array.tobytes() == state[role][name].tobytes()
    wanted = {"policy_model": {"t0": TensorSpec.piece("t0", np.float32, (8, 6), Box((2, 1), (4, 4)))}}
    [(_, _, found)] = read_boxes(storage, manifest, wanted)
    assert found.tobytes() == state["policy_model"]["t0"][2:6, 1:5].tobytes()
