"""Converts the result of `make` to the arrays and metadata of a journal record, and back.

`make` returns arrays by name, one array, or a pair of either and a small JSON value:

    {"tokens": ..., "rewards": ...}         arrays: name -> array
    np.array([...])                         one array
    ({"tokens": ...}, {"tries": 3})         and JSON

What comes back has the same form, order of names, dtypes, shapes and bits, whether it was just made or comes
from the journal: arrays are separate copies, C-contiguous, little-endian and writable.

    metadata    name, after (the step before), form (array, arrays), names (of the arrays, JSON, in their
                order), info (JSON, if it was given)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollforward.store import strictjson
from rollforward.store.journal.records import Record
from rollforward.store.tensorfile import DTYPES, dtype_code

Arrays = dict[str, NDArray[Any]]

NAME = "name"
FORM = "form"
NAMES = "names"
INFO = "info"
EVALUATION = "evaluation"
"""By convention the name of what is made to be measured, not to be trained on."""
_ALONE = "value"
"""The name for an array that was given without one."""


def pack(made: Any) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata of a record; ValueError says what cannot be stored."""
    metadata: dict[str, str] = {}
    if isinstance(made, tuple):
        if len(made) != 2:
            raise ValueError(f"a tuple of {len(made)}, where (arrays, JSON) is expected")
        made, info = made
        metadata[INFO] = strictjson.dump(info)
    if isinstance(made, Mapping):
        arrays = {_name(name): _copied(f"{name!r}", array) for name, array in made.items()}
        return arrays, {FORM: "arrays", NAMES: strictjson.dump(list(arrays)), **metadata}
    return {_ALONE: _copied("the array", made)}, {FORM: "array", **metadata}


def unpack(arrays: Arrays, metadata: Mapping[str, str]) -> Any:
    """What was given to `pack`, in the same form; ValueError when the record does not hold it."""
    names = strictjson.parse(metadata.get(NAMES, "[]").encode()) if FORM in metadata else None
    made: Any
    if (
        metadata.get(FORM) == "arrays"
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and sorted(names) == sorted(arrays)
    ):
        made = {name: arrays[name] for name in names}
    elif metadata.get(FORM) == "array" and arrays.keys() == {_ALONE}:
        made = arrays[_ALONE]
    else:
        raise ValueError("not a record of a `once` result")
    return (made, strictjson.parse(metadata[INFO].encode())) if INFO in metadata else made


def copied(record: Record) -> Arrays:
    """Writable copies of the read-only arrays of a record."""
    return {name: np.array(array, order="C", copy=True) for name, array in record.arrays.items()}


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"the name {name!r} is not a string")
    return name


def _copied(what: str, value: Any) -> NDArray[Any]:
    array = np.array(value, order="C", copy=True)
    try:
        stored = DTYPES[dtype_code(array.dtype)]
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if array.dtype.byteorder == ">":
        return array.astype(stored)
    return array.view(stored)
