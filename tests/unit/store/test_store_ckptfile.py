"""`.ckpt` files: those that MindSpore saves are read as it reads them, and damaged ones are refused."""

import numpy as np
import pytest
from ckpt_writer import ckpt_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from rollforward.errors import CheckpointInvalid
from rollforward.interop.files import read_arrays, read_layout

ARRAYS = {
    "model.layers.0.attention.wq.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.arange(5, dtype=np.float16),
    "global_step": np.array([7], np.int32),
    "epoch_num": np.array(3, np.int64),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def assert_headers_tell_the_same(path):
    arrays = dict(read_arrays(path))
    layout = read_layout(path)
    assert [(n, a.dtype, a.shape) for n, a in layout.items()] == [
        (n, a.dtype, a.shape) for n, a in arrays.items()
    ]


class TestOfMindSpore:
    def save(self, path, named, **how):
        ms = pytest.importorskip("mindspore")
        parameters = [{"name": name, "data": ms.Tensor(array)} for name, array in named.items()]
        ms.save_checkpoint(parameters, str(path), **how)

    def load(self, path):
        ms = pytest.importorskip("mindspore")
        return {name: parameter.asnumpy() for name, parameter in ms.load_checkpoint(str(path)).items()}

    def test_every_type_and_shape(self, tmp_path):
        types = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
        named = {code: np.arange(6).astype(code).reshape(2, 3) for code in types}
        named |= {"scalar": np.array(2.5, np.float32), "one": np.array([2], np.int64)}
        self.save(tmp_path / "a.ckpt", named)
        assert_same(dict(read_arrays(tmp_path / "a.ckpt")), named)
        assert_same(dict(read_arrays(tmp_path / "a.ckpt")), self.load(tmp_path / "a.ckpt"))
        assert_headers_tell_the_same(tmp_path / "a.ckpt")

    def test_bfloat16_is_widened(self, tmp_path):
        ms = pytest.importorskip("mindspore")
        tensor = ms.Tensor([1.5, -2.0, 0.1], ms.bfloat16)
        parameters = [{"name": "a", "data": tensor}, {"name": "b", "data": ms.Tensor(0.5, ms.bfloat16)}]
        ms.save_checkpoint(parameters, str(tmp_path / "a.ckpt"))
        expected = {"a": tensor.float().asnumpy(), "b": np.array(0.5, np.float32)}
        assert_same(dict(read_arrays(tmp_path / "a.ckpt")), expected)
        assert_headers_tell_the_same(tmp_path / "a.ckpt")

    def test_counters_and_text_that_are_appended(self, tmp_path):
        counters = {"epoch_num": 3, "loss_scale": 2.0, "done": True, "about": "text"}
        self.save(tmp_path / "a.ckpt", {"a": np.ones(2, np.float32)}, append_dict=counters)
        found = dict(read_arrays(tmp_path / "a.ckpt"))
        assert {name: found[name].item() for name in counters} == counters

    @pytest.mark.parametrize("rows", [1, 7, 64])
    def test_a_parameter_in_pieces(self, tmp_path, monkeypatch, rows):
        serialization = pytest.importorskip("mindspore.train.serialization")
        monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KiB, where it is half a GiB
        named = {"a": np.arange(rows * 300, dtype=np.float32).reshape(rows, 300), "b": np.ones(3, np.float32)}
        self.save(tmp_path / "a.ckpt", named)
        assert_same(dict(read_arrays(tmp_path / "a.ckpt")), named)

    def test_a_crc_is_checked(self, tmp_path):
        self.save(tmp_path / "a.ckpt", ARRAYS, crc_check=True)
        assert_same(dict(read_arrays(tmp_path / "a.ckpt")), ARRAYS)
        content = bytearray((tmp_path / "a.ckpt").read_bytes())
        content[content.index(ARRAYS["half"].tobytes())] ^= 1
        (tmp_path / "b.ckpt").write_bytes(content)
        assert read_layout(tmp_path / "b.ckpt").keys() == ARRAYS.keys()
        with pytest.raises(CheckpointInvalid, match="CRC"):
            list(read_arrays(tmp_path / "b.ckpt"))

    def test_an_encrypted_file_is_refused(self, tmp_path):
        self.save(tmp_path / "a.ckpt", ARRAYS, enc_key=b"0123456789ABCDEF", enc_mode="AES-GCM")
        with pytest.raises(CheckpointInvalid, match="or it is encrypted"):
            read_layout(tmp_path / "a.ckpt")

    def test_what_our_tests_write_is_what_mindspore_reads(self, tmp_path):
        (tmp_path / "a.ckpt").write_bytes(ckpt_bytes(ARRAYS))
        assert_same(self.load(tmp_path / "a.ckpt"), ARRAYS)
        assert_same(dict(read_arrays(tmp_path / "a.ckpt")), ARRAYS)


def test_cut_anywhere_but_between_tensors_it_is_refused(tmp_path):
    whole = ckpt_bytes(ARRAYS)
    between = {len(ckpt_bytes(dict(list(ARRAYS.items())[:count]))) for count in range(1, len(ARRAYS) + 1)}
    path = tmp_path / "a.ckpt"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        if size in between:
            assert len(read_layout(path)) == 1 + sorted(between).index(size)
        else:
            with pytest.raises(CheckpointInvalid, match=r"not a whole \.ckpt file|an empty file"):
                read_layout(path)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_whatever_is_in_a_file_nothing_but_a_clear_refusal_comes_of_it(tmp_path_factory, data):
    content = bytearray(ckpt_bytes(ARRAYS))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.ckpt"
    path.write_bytes(content)
    try:
        found = dict(read_arrays(path))
    except CheckpointInvalid:
        return
    assert sum(array.nbytes for array in found.values()) <= len(content)


def test_a_name_that_comes_twice_is_refused(tmp_path):
    one = ckpt_bytes({"a": np.ones(2, np.float32)})
    (tmp_path / "a.ckpt").write_bytes(one + ckpt_bytes({"b": np.ones(2, np.float32)}) + one)
    with pytest.raises(CheckpointInvalid, match="'a' is there twice"):
        read_layout(tmp_path / "a.ckpt")
