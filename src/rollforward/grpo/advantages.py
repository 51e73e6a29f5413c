"""Group-relative advantages: a completion is compared with its siblings.

With G completions of one prompt and rewards r_1 .. r_G,

    A_i = (r_i - mean(r)) / (std(r) + 1e-4)      DeepSeekMath, arXiv:2402.03300, equation 3 ff.
    A_i =  r_i - mean(r)                         Dr. GRPO, arXiv:2503.20783

The second omits the standard deviation, which otherwise weights prompts by how easy or hard
they are. `std` is the population standard deviation (divided by G). Sums are computed in float64.
"""

import numpy as np
from numpy.typing import NDArray

from rollforward.grpo.types import Floats

_EPSILON = 1e-4


def centred_advantages(rewards: Floats, num_generations: int) -> Floats:
    """Rewards minus their group's mean. float32 [B] in and out; a group's samples are consecutive."""
    return _centred(rewards, num_generations).astype(np.float32).reshape(-1)


def standardised_advantages(rewards: Floats, num_generations: int) -> Floats:
    """Rewards minus their group's mean, over its standard deviation. float32 [B] in and out."""
    centred = _centred(rewards, num_generations)
    scale = centred.std(axis=1, keepdims=True) + _EPSILON
    return np.divide(centred, scale).astype(np.float32).reshape(-1)


def _centred(rewards: Floats, num_generations: int) -> NDArray[np.float64]:
    groups = rewards.astype(np.float64).reshape(-1, num_generations)
    return np.subtract(groups, groups.mean(axis=1, keepdims=True))
