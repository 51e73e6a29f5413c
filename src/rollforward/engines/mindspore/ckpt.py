"""Files in MindSpore's own checkpoint format, `.ckpt`: protobuf, no pickle, read by MindSpore itself."""

from typing import Any

import mindspore as ms
from numpy.typing import NDArray


def load_ckpt(path: str) -> dict[str, NDArray[Any]]:
    """Parameter name -> array; bfloat16 comes as float32, which loses nothing."""
    found: dict[str, NDArray[Any]] = {}
    for name, parameter in ms.load_checkpoint(path).items():
        value = parameter.float() if parameter.dtype == ms.bfloat16 else parameter
        found[name] = value.asnumpy()
    return found
