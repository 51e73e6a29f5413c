"""The state of this process's random generators as arrays: Python's, NumPy's, PyTorch's, and of its device.

python          uint64[627]: the generator's version, its 625 words, whether a normal deviate is left over
python_normal   float64[]: that deviate
numpy           uint64[627]: the 624 words of MT19937, its place, whether a normal deviate is left over
numpy_normal    float64[]
torch           uint8[n]: opaque; cuda: of the current device, if PyTorch has used CUDA
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rollforward.torch.arrays import Arrays


def random_state() -> Arrays:
    """The state of all generators of this process."""
    version, words, normal = random.getstate()
    kind, keys, place, has_normal, numpy_normal = np.random.get_state()
    assert kind == "MT19937"
    found = {
        "python": np.array([version, *words, normal is not None], np.uint64),
        "python_normal": np.array(normal or 0.0, np.float64),
        "numpy": np.array([*np.asarray(keys).tolist(), place, has_normal], np.uint64),
        "numpy_normal": np.array(numpy_normal, np.float64),
        "torch": torch.random.get_rng_state().numpy(),
    }
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.get_rng_state().numpy()
    return found


def set_random_state(state: Mapping[str, NDArray[Any]]) -> None:
    """Continue with a state of `random_state`."""
    own = generator_states(state)
    random.setstate(own["python"])
    np.random.set_state(own["numpy"])
    torch.random.set_rng_state(own["cpu"])
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"])


def generator_states(state: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The same in the generators' own forms, under the names that transformers gives them."""
    version, *words, has_normal = state["python"].tolist()
    *keys, place, has_numpy_normal = state["numpy"].tolist()
    found = {
        "python": (version, tuple(words), float(state["python_normal"]) if has_normal else None),
        "numpy": (
            "MT19937",
            np.array(keys, np.uint32),
            place,
            has_numpy_normal,
            float(state["numpy_normal"]),
        ),
        "cpu": torch.from_numpy(np.array(state["torch"], np.uint8)),
    }
    if "cuda" in state:
        found["cuda"] = torch.from_numpy(np.array(state["cuda"], np.uint8))
    return found
