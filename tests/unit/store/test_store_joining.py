"""Tensors split over ranks are put together as MindSpore splits them, and nothing else is made of them."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from ckpt_writer import ckpt_bytes, strategy_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from rollforward.errors import CheckpointMismatch
from rollforward.interop.joining import is_split, joined_layout, read_joined
from rollforward.interop.strategies import Layout, find_strategy

NONE = (0, 0)
SPLITS = {
    # Devices and tensor map as MindSpore counts the axes of the grid: from the last.
    "rows": ([2, 2], [0, -1], *NONE),
    "columns": ([2, 2], [-1, 1], *NONE),
    "both": ([2, 2], [1, 0], *NONE),
    "whole": ([2, 2], [-1, -1], *NONE),
    "vector": ([2, 2], [0], *NONE),
    "by both axes of the grid": ([2, 2], [[1, 0], [-1]], *NONE),
    "optimizer parallel": ([2, 2], [-1, 0], 2, 2),
    "of the rows of one device": ([2, 2], [0, -1], 2, 2),
    "over all": ([2, 2], [-1, -1], 1, -1),
    "over some": ([2, 2], [-1, -1], 1, 2),
    "three axes": ([2, 2], [-1, 1, 0], *NONE),
}


def whole_of(splits):
    source = np.random.default_rng(3)
    shapes = {name: [8] * (len(axes)) for name, (_, axes, _, _) in splits.items()}
    return {name: source.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def put_strategy(folder: Path, splits, *, name="strategy_0.ckpt", stage=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(strategy_bytes(splits, stage=stage))
    return find_strategy([folder / "nowhere", folder])


def mindspore_splits(root: Path, arrays, ranks):
    """The files of each rank, made by MindSpore of a file that has all."""
    ms = pytest.importorskip("mindspore")
    (root / "whole/rank_0").mkdir(parents=True)
    (root / "whole/rank_0/a.ckpt").write_bytes(ckpt_bytes(arrays))
    strategy = str(root / "strategy/strategy_0.ckpt")
    ms.transform_checkpoints(str(root / "whole"), str(root / "parts"), "part_", None, strategy)
    return tuple(root / f"parts/rank_{rank}/part_{rank}.ckpt" for rank in range(ranks))


def assert_joined(paths, strategy, expected):
    layout = joined_layout(paths, strategy)
    for choice in range(2):
        found = dict(read_joined(paths, strategy, choice=choice))
        assert found.keys() == layout.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
            assert (layout[name].shape, layout[name].dtype) == (array.shape, array.dtype)


def test_what_mindspore_splits_is_put_together(tmp_path):
    expected = {**whole_of(SPLITS), "global_step": np.array([7], np.int32)}
    strategy = put_strategy(tmp_path / "strategy", SPLITS)
    paths = mindspore_splits(tmp_path, expected, 4)
    assert is_split(paths, strategy)
    assert_joined(paths, strategy, expected)


@pytest.mark.parametrize(
    "splits",
    [
        {"a": ([2, 2, 2], [2, -1], 1, 4), "b": ([2, 2, 2], [-1, 1], 4, 2), "c": ([2, 2, 2], [1], 1, 2)},
        {"a": ([1, 4, 2], [0, -1], 2, 4), "b": ([1, 4, 2], [1, 0], *NONE), "c": ([1, 4, 2], [-1], 1, 8)},
        {"a": ([8], [-1, 0], *NONE), "b": ([8], [-1, -1], 1, -1), "c": ([8], [-1, -1], 1, 4)},
    ],
    ids=["a cube", "with an axis of one", "in a row"],
)
def test_other_grids(tmp_path, splits):
    strategy = put_strategy(tmp_path / "strategy", splits)
    paths = mindspore_splits(tmp_path, whole_of(splits), 8)
    assert_joined(paths, strategy, whole_of(splits))


def test_stages_of_a_pipeline_and_files_of_safetensors(tmp_path):
    arrays = {"first": np.arange(8.0).reshape(4, 2), "second": np.arange(8.0), "shared": np.ones(2)}
    put_strategy(tmp_path / "s", {"first": ([2], [0, -1], 0, 0), "shared": ([2], [-1], 0, 0)})
    later = {"second": ([2], [0], 0, 0), "shared": ([2], [-1], 0, 0)}
    strategy = put_strategy(tmp_path / "s", later, name="strategy_2.ckpt", stage=1)
    parts = [
        {"first": arrays["first"][:2], "shared": arrays["shared"]},
        {"first": arrays["first"][2:], "shared": arrays["shared"]},
        {"second": arrays["second"][:4], "shared": arrays["shared"]},
        {"second": arrays["second"][4:]},
    ]
    paths = tuple(tmp_path / f"{rank}.safetensors" for rank in range(4))
    for path, part in zip(paths, parts, strict=True):
        safetensors.numpy.save_file({name: array.copy() for name, array in part.items()}, path)
    assert is_split(paths, strategy)
    assert_joined(paths, strategy, arrays)


def test_tensors_that_are_whole_everywhere_are_not_split(tmp_path):
    strategy = put_strategy(tmp_path, {"a": ([2], [-1], 0, 0)})
    paths = (tmp_path / "0.ckpt", tmp_path / "1.ckpt")
    for path in paths:
        path.write_bytes(ckpt_bytes({"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}))
    assert not is_split(paths, strategy)


class TestRefused:
    def paths(self, folder, *parts):
        for rank, part in enumerate(parts):
            (folder / f"{rank}.ckpt").write_bytes(ckpt_bytes(part))
        return tuple(folder / f"{rank}.ckpt" for rank in range(len(parts)))

    def refuse(self, paths, strategy, told):
        for read in (joined_layout, lambda *of: dict(read_joined(*of, choice=0))):
            with pytest.raises(CheckpointMismatch, match=told):
                read(paths, strategy)

    def test_a_piece_that_no_file_holds(self, tmp_path):
        strategy = put_strategy(tmp_path, {"a": ([2], [0], 0, 0)})
        half = np.ones(2, np.float32)
        paths = self.paths(tmp_path, {"a": half}, {"b": half})
        self.refuse(paths, strategy, "a is split into 2 pieces, and the files hold 1 of them")

    def test_pieces_of_different_sizes(self, tmp_path):
        strategy = put_strategy(tmp_path, {"a": ([2], [0], 0, 0)})
        paths = self.paths(tmp_path, {"a": np.ones(2, np.float32)}, {"a": np.ones(3, np.float32)})
        self.refuse(paths, strategy, r"tensors of different shapes or types: \[4\], \[6\]")

    def test_a_strategy_of_another_model(self, tmp_path):
        strategy = put_strategy(tmp_path, {"a": ([2], [0, -1], 0, 0)})
        paths = self.paths(tmp_path, *[{"a": np.ones(2, np.float32)}] * 2)
        self.refuse(paths, strategy, "a has 1 axes, but 2 in ")

    def test_a_strategy_of_fewer_ranks(self, tmp_path):
        strategy = put_strategy(tmp_path, {"a": ([2], [0], 0, 0)})
        paths = self.paths(tmp_path, *[{"a": np.ones(2, np.float32)}] * 4)
        self.refuse(paths, strategy, "rank 2 holds a, which .* places on other ranks")

    def test_a_file_that_is_no_strategy(self, tmp_path):
        (tmp_path / "strategy_0.ckpt").write_bytes(b"not one")
        with pytest.raises(CheckpointMismatch, match="is not a strategy file of MindSpore"):
            find_strategy([tmp_path])

    @given(data=st.data())
    @settings(max_examples=100, deadline=None)
    def test_whatever_is_in_a_strategy_file(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("damaged")
        splits = {"a": ([2], [0], 0, 0), "b": ([2], [-1], 1, 2)}
        content = bytearray(strategy_bytes(splits))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        (folder / "strategy_0.ckpt").write_bytes(content)
        paths = self.paths(folder, *[{"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}] * 2)
        try:
            strategy = find_strategy([folder])
            is_split(paths, strategy)
            found = dict(read_joined(paths, strategy, choice=0))
        except CheckpointMismatch:
            return
        assert all(array.nbytes <= 16 for array in found.values())


def test_mindspore_reads_the_strategy_files_of_these_tests(tmp_path):
    pytest.importorskip("mindspore")
    from mindspore.parallel._parallel_serialization import _build_searched_strategy, _convert_to_list

    put_strategy(tmp_path, SPLITS)
    found = _convert_to_list(_build_searched_strategy(str(tmp_path / "strategy_0.ckpt")))
    for name, (devices, axes, step, size) in SPLITS.items():
        assert found[name][:2] == [devices, axes]
        assert found[name][4:6] == [step, size]


def test_which_rank_has_which_piece():
    """Rank 5 of a grid of 2 x 2 x 2 is at (1, 0, 1)."""
    assert Layout((2, 2, 2), ((2,), (0,))).place(5) == (1, 1)
    assert Layout((2, 2, 2), ((), (1, 2))).place(5) == (0, 1)
    sharded = Layout((2, 2, 2), ((2,), ()), shards=4)
    assert sharded.splits == (8, 1)
    assert [sharded.place(rank)[0] for rank in range(8)] == [0, 4, 1, 5, 2, 6, 3, 7]
