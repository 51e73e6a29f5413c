"""Random moments for kills, so that each takes place and any moment of the run's time may be hit.

A start that is killed d seconds after it began has done at most d seconds of work, and so the starts after it
still have at least T - d to do. Hence for N kills in a run that works for T seconds: draw N moments of the
whole, uniformly and independently; in their order, the time from one to the next is how long that start may
work. Whatever is lost at a kill, and whatever a start takes to load, makes the run longer, never shorter.
"""

import random
from collections.abc import Sequence

SURE = 0.9
"""The share of the time that is used: no two runs take exactly as long."""


def draw_moments(chance: random.Random, kills: int, seconds: float) -> Sequence[float]:
    """For each kill, the seconds after its start began to work; `seconds` is what the whole run worked."""
    drawn = sorted(chance.uniform(0.0, SURE * seconds) for _ in range(kills))
    return [later - earlier for earlier, later in zip([0.0, *drawn], drawn, strict=False)]
