"""Every element type that safetensors has, on every path: saved, restored, compared, journaled, exported."""

import warnings

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_disk import SimulatedDisk

from rollforward.errors import CheckpointInvalid
from rollforward.inspection.comparing import diff
from rollforward.inspection.verifying import verify_checkpoints
from rollforward.interop.exporting import export_huggingface
from rollforward.interop.files import read_arrays
from rollforward.position import Position
from rollforward.storage import LocalStorage
from rollforward.store import CheckpointStore, check_layout, read_tensors, restore_into
from rollforward.store.journal.records import Record, decode_record, encode_record
from rollforward.store.tensorfile import DTYPES, PACKED, read_header
from rollforward.tensors import layout_of

POSITION = Position(0, 1)
THEIRS = {"BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ"}
THEIRS |= {"F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"}
"""What safetensors 0.8 knows."""


def save(storage, tensors, step=1):
    return (
        CheckpointStore(storage)
        .save(Position(0, step), tensors, global_step=step, run_id="r", incarnation=1, state={})
        .manifest
    )


def some(code, shape=(3, 2)):
    """Small positive numbers of a type."""
    return np.arange(1, 1 + int(np.prod(shape))).reshape(shape).astype(DTYPES[code])


@st.composite
def arrays(draw):
    """An array of any type and any bits; sometimes not in C order, sometimes not little-endian."""
    code = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = int(np.prod(shape)) * DTYPES[code].itemsize
    bits = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).copy()
    if code == "BOOL":
        bits &= 1
    array = bits.view(DTYPES[code]).reshape(shape)
    if draw(st.booleans()):
        array = np.asfortranarray(array)
    if draw(st.booleans()) and code not in ("BF16", "BOOL") and not code.startswith("F8"):
        array = array.byteswap().view(array.dtype.newbyteorder(">"))
    return code, array


def little(array):
    """Its bytes in C order, little-endian; swapped as bytes, so that no NaN is touched."""
    return (array.byteswap() if array.dtype.byteorder == ">" else array).tobytes()


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("abc.", min_size=1, max_size=6), arrays(), min_size=1, max_size=4))
def test_any_array_comes_back_with_its_dtype_and_its_bits(drawn):
    storage = LocalStorage("/run", SimulatedDisk())
    tensors = {name: array for name, (_, array) in drawn.items()}
    manifest = save(storage, {"policy_model": tensors})
    found = {name: array for _, name, array in read_tensors(storage, manifest)}
    into = {name: np.zeros(array.shape, array.dtype) for name, array in tensors.items()}
    restore_into(storage, manifest, {"policy_model": into})
    check_layout(storage, manifest, layout_of({"policy_model": into}))
    with storage.open(manifest.files[0].path) as handle:
        content = bytearray(handle.size)
        handle.read_into(memoryview(content), 0)
    theirs = dict(safetensors.deserialize(bytes(content)))
    for name, (code, array) in drawn.items():
        assert found[name].dtype == DTYPES[code]
        assert found[name].tobytes() == little(into[name]) == little(array)
        assert bytes(theirs[name]["data"]) == little(array)
        assert (theirs[name]["dtype"], theirs[name]["shape"]) == (code, list(array.shape))


def test_there_is_no_type_of_safetensors_that_is_neither_stored_nor_refused_as_packed():
    assert set(DTYPES) | PACKED == THEIRS


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_a_record_of_the_journal_keeps_every_type(code):
    for array in (some(code), some(code).T, some(code, ()), some(code, (0, 2))):
        record = decode_record(encode_record(Record("rollouts", POSITION, "now", {}, {"a": array})))
        assert record.arrays["a"].dtype == DTYPES[code]
        assert record.arrays["a"].tobytes() == array.tobytes()


@pytest.mark.parametrize("code", sorted(DTYPES))
def test_checkpoints_of_every_type_are_verified_and_compared(code):
    storage = LocalStorage("/run", SimulatedDisk())
    one = some(code)
    other = one.copy()
    other[1, 0] = 0 if code != "F8_E8M0" else 8
    first = save(storage, {"policy_model": {"w": one}}, 1)
    second = save(storage, {"policy_model": {"w": other}}, 2)
    assert [verdict.reason for verdict in verify_checkpoints(storage)] == ["", ""]
    assert diff(storage, first, storage, first) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = diff(storage, first, storage, second)
    assert (found.what, found.elements) == ("values", 1)
    assert found.largest == {"BOOL": 1, "F8_E8M0": 4}.get(code, 3)


def test_integers_that_float64_cannot_tell_apart_differ():
    storage = LocalStorage("/run", SimulatedDisk())
    first = save(storage, {"policy_model": {"w": np.array([1 << 62, -5], np.int64)}}, 1)
    second = save(storage, {"policy_model": {"w": np.array([(1 << 62) + 1, 7], np.int64)}}, 2)
    (found,) = diff(storage, first, storage, second)
    assert (found.elements, found.largest) == (2, 12.0)


def test_nan_of_bfloat16_keeps_its_payload_even_into_an_array_that_is_not_contiguous():
    storage = LocalStorage("/run", SimulatedDisk())
    bits = np.array([[0x7FC1, 0xFFA5], [0x7F81, 0x3F80]], np.uint16)
    manifest = save(storage, {"policy_model": {"w": bits.view(ml_dtypes.bfloat16)}})
    into = np.zeros((2, 2), ml_dtypes.bfloat16).T
    restore_into(storage, manifest, {"policy_model": {"w": into}})
    assert np.array_equal(np.ascontiguousarray(into).view(np.uint16), bits)


def test_a_bfloat16_policy_is_exported_as_bfloat16(tmp_path):
    storage, out = LocalStorage(tmp_path / "run"), LocalStorage(tmp_path / "out")
    weights = some("BF16")
    manifest = save(storage, {"policy_model": {"w": weights}})
    export_huggingface(storage, manifest, out)
    with out.open("model.safetensors") as handle:
        assert [item.dtype for item in read_header(handle, "it").tensors] == ["BF16"]
    ((name, values),) = read_arrays(tmp_path / "out" / "model.safetensors")
    assert (name, values.dtype) == ("w", np.float32)
    assert np.array_equal(values, weights.astype(np.float32))


@pytest.mark.parametrize("code", sorted(PACKED))
def test_a_file_of_packed_elements_is_refused_by_name(tmp_path, code):
    tensor = {"w": {"dtype": code, "shape": [8], "data_offsets": [0, 4 if code == "F4" else 6]}}
    size = tensor["w"]["data_offsets"][1]
    head = str(tensor).replace("'", '"').encode()
    content = len(head).to_bytes(8, "little") + head + bytes(size)
    assert safetensors.deserialize(content)[0][0] == "w"
    (tmp_path / "f").write_bytes(content)
    with (
        LocalStorage(tmp_path).open("f") as handle,
        pytest.raises(CheckpointInvalid, match=f"{code}, a packed"),
    ):
        read_header(handle, "f")
