"""What the Q-DiT release really searches (see its loop).

Weight groups only, symmetric, without guidance, under a mean of the group sizes.
"""

from __future__ import annotations

from qdit_jax.allocation.strategies.evolution import Evolve

QDIT_RELEASE = Evolve(
    name="qdit-release",
    budget="mean-group=128",
    space={"sides": "weights", "symmetric": True},
    guided=False,
)
