import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from simulated_disk import SimulatedDisk

from rollforward.boxes import whole
from rollforward.errors import CheckpointInvalid
from rollforward.storage import LocalStorage
from rollforward.store.tensorfile import (
    DTYPES,
    ArraySource,
    blocks_of,
    dtype_code,
    new_array,
    read_header,
    read_verified,
    write_tensors,
)


def write(storage, tensors, path="f.safetensors"):
    return write_tensors(storage, path, {name: ArraySource(array) for name, array in tensors.items()})


def read(storage, written):
    found = {}
    with storage.open(written.path) as handle:
        header = read_header(handle, written.path)
        assert [item.place for item in header.tensors] == [item.place for item in written.tensors]
        for record in written.tensors:
            found[record.name], data = new_array(record.dtype, record.shape)
            begin = 0
            for block in blocks_of(record, whole(record.shape)):
                what = f"{written.path}: tensor {record.name!r}"
                read_verified(handle, block, what, data[begin : begin + block.size])
                begin += block.size
    return found


def test_every_dtype_and_odd_shape_survives(tmp_path):
    tensors = {}
    for code in DTYPES:
        for shape in ((), (0,), (3, 0, 2), (1,), (7,), (2, 3, 5)):
            size = int(np.prod(shape)) * DTYPES[code].itemsize
            data = np.arange(size, dtype=np.uint8) % (2 if code == "BOOL" else 251)
            tensors[f"{code}{shape}"] = data.view(DTYPES[code]).reshape(shape)
    storage = LocalStorage(tmp_path)
    found = read(storage, write(storage, tensors))
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_the_safetensors_library_opens_our_files(tmp_path):
    tensors = {
        "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "step": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float16),
        "flags": np.array([True, False, True]),
        "名前": np.ones(3, np.float64),
    }
    written = write(LocalStorage(tmp_path), tensors)
    found = safetensors.numpy.load_file(tmp_path / written.path)
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(tmp_path / written.path, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_our_header_reader_opens_files_of_the_safetensors_library(tmp_path):
    safetensors.numpy.save_file({"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.int8)}, tmp_path / "f")
    with LocalStorage(tmp_path).open("f") as handle:
        header = read_header(handle, "f")
    assert {item.name: (item.dtype, item.shape) for item in header.tensors} == {
        "a": ("F32", (2, 2)),
        "b": ("I8", (3,)),
    }


def test_data_begins_on_a_page_and_each_tensor_on_a_multiple_of_its_element(tmp_path):
    tensors = {f"{code}{n}": np.zeros(n, DTYPES[code]) for code in DTYPES for n in (1, 3)}
    written = write(LocalStorage(tmp_path), tensors)
    assert written.tensors[0].begin % 4096 == 0
    assert all(item.begin % DTYPES[item.dtype].itemsize == 0 for item in written.tensors)


def test_views_strides_and_big_endian_arrays_are_stored_as_their_values(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {"transposed": base.T, "strided": base[::2, 1::2], "big": base.astype(">f4")}
    storage = LocalStorage(tmp_path)
    found = read(storage, write(storage, tensors))
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_complex128_and_text_are_refused_before_anything_is_written(tmp_path):
    for array in (np.zeros(2, np.complex128), np.array(["a"])):
        with pytest.raises(ValueError, match="cannot be stored"):
            write(LocalStorage(tmp_path), {"x": array})
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_known_by_name():
    """A framework may have registered a bfloat16 of its own with NumPy."""

    class Bfloat16:
        name = "bfloat16"

    assert dtype_code(Bfloat16()) == "BF16"


@pytest.mark.parametrize("name", ["int4", "float4_e2m1fn", "float6_e2m3fn", "float8_e3m4", "float8_e4m3"])
def test_what_safetensors_has_no_whole_byte_type_for_is_refused(name):
    with pytest.raises(ValueError, match=f"dtype {name} cannot be stored"):
        dtype_code(np.dtype(getattr(ml_dtypes, name)))


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {"b": np.ones(5, np.float32), "a": np.zeros((2, 2), np.int64)}
    storage = LocalStorage(tmp_path)
    first = write(storage, tensors, "first")
    second = write(storage, dict(reversed(tensors.items())), "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert first.digest == second.digest


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name != "__metadata__"),
        hnp.arrays(
            st.sampled_from([np.float32, np.int64, np.uint8, np.bool_]),
            hnp.array_shapes(min_dims=0, min_side=0),
        ),
        max_size=5,
    )
)
def test_anything_that_is_written_reads_back(tensors):
    storage = LocalStorage("/run", SimulatedDisk())
    found = read(storage, write(storage, tensors))
    assert found.keys() == tensors.keys()
    assert all(found[name].tobytes() == tensors[name].tobytes() for name in tensors)


def entry(**changed):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changed


BAD_HEADERS = {
    "not an object": [],
    "an unknown dtype": {"a": entry(dtype="Q9")},
    "a packed dtype": {"a": entry(dtype="F4", shape=[16])},
    "a dtype that is not a text": {"a": entry(dtype=["F32"])},
    "a shape that does not fit": {"a": entry(shape=[3])},
    "a negative size": {"a": entry(shape=[-2])},
    "a size of 10**18": {"a": entry(shape=[10**18])},
    "a shape with a bool": {"a": entry(shape=[True, 2])},
    "offsets beyond the file": {"a": entry(shape=[200], data_offsets=[0, 800])},
    "offsets backwards": {"a": entry(shape=[], data_offsets=[8, 0])},
    "three offsets": {"a": entry(data_offsets=[0, 4, 8])},
    "a gap": {"a": entry(shape=[1], data_offsets=[4, 8])},
    "an overlap": {"a": entry(), "b": entry()},
    "bytes that nobody describes": {"a": entry(shape=[1], data_offsets=[0, 4])},
    "another key": {"a": entry(extra=1)},
    "metadata that is not text": {"__metadata__": {"a": 1}, "a": entry()},
}


@pytest.mark.parametrize("why", BAD_HEADERS)
def test_a_malformed_header_is_rejected(tmp_path, why):
    text = json.dumps(BAD_HEADERS[why]).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with LocalStorage(tmp_path).open("f") as handle, pytest.raises(CheckpointInvalid):
        read_header(handle, "f")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (1 << 62).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{]",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (10000).to_bytes(8, "little") + b"[" * 10000,
        (19).to_bytes(8, "little") + b'{"a":{},"a":{}}    ',
        (14).to_bytes(8, "little") + b'{"a": NaN}    ',
    ],
    ids=[
        "empty",
        "seven bytes",
        "absurd length",
        "past the end",
        "JSON",
        "UTF-8",
        "nesting",
        "duplicate",
        "NaN",
    ],
)
def test_a_header_that_lies_is_rejected_without_taking_its_word(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with LocalStorage(tmp_path).open("f") as handle, pytest.raises(CheckpointInvalid):
        read_header(handle, "f")


def test_a_flipped_bit_in_the_data_is_found_and_the_tensor_named(tmp_path):
    storage = LocalStorage(tmp_path)
    written = write(storage, {"good": np.ones(4, np.float64), "bad": np.ones(4, np.float32)})
    content = bytearray((tmp_path / written.path).read_bytes())
    content[-1] ^= 1
    (tmp_path / written.path).write_bytes(content)
    with pytest.raises(CheckpointInvalid, match=r"tensor 'bad' does not have its recorded digest"):
        read(storage, written)
