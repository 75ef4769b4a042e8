"""What the published code of Q-DiT searches, which differs from the paper.

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
