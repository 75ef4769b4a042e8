"""A family with nothing of a transformer: a U-shaped network of convolutions, without a condition.

Two levels joined by a skip, one linear attention-free mixing layer a level, FiLM by the timestep; it
predicts the data. Dimensions: B batch, H, W, C a picture, D width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from qdit_jax.models import (
    Family,
    Fold,
    Layers,
    NetworkModule,
    Producer,
    TimestepEmbedder,
    example_inputs,
)


class Level(nn.Module):
    """Returns one level: a convolution, then two linear layers over channels, with FiLM between."""

    layers: Layers

    @nn.compact
    def __call__(self, x: Any, time: Any) -> Any:
        d = x.shape[-1]
        hidden = nn.Conv(d, (3, 3), name="spread")(x)
        shift = self.layers.linear(d, nn.initializers.normal(0.2), name="film")(nn.silu(time))
        hidden = self.layers.linear(2 * d, name="widen")(hidden + shift[:, None, None])
        return x + self.layers.linear(d, name="narrow")(nn.gelu(hidden))


class ToyPainter(NetworkModule):
    """A small unconditional network that predicts the data."""

    size: int = 4
    channels: int = 1
    width: int = 16

    prediction = "sample"
    learned_variance = False
    has_null = False
    guided_channels = None
    default_sampler = "ddim"

    @nn.compact
    def __call__(self, x: Any, timestep: Any, condition: Any) -> Any:
        d = self.width
        time = TimestepEmbedder(d, layers=self.layers, name="time")(timestep)
        fine = self.layers.linear(d, name="enter")(x)
        fine = Level(self.layers, name="down")(fine, time)
        coarse = Level(self.layers, name="middle")(nn.avg_pool(fine, (2, 2), (2, 2)), time)
        upper = jax.image.resize(coarse, fine.shape, "nearest")
        joined = self.layers.linear(d, name="join")(jnp.concatenate([fine, upper], axis=-1))
        joined = Level(self.layers, name="up")(joined, time)
        mixed = self.layers.linear(d, name="values")(joined)
        return self.layers.linear(self.channels, name="leave")(mixed)

    def sample_shape(self) -> tuple[int, ...]:
        return (self.size, self.size, self.channels)

    def example_condition(self, batch: int) -> None:
        return None

    def all_conditions(self) -> None:
        return None

    def null_condition(self, condition: Any, params: Any) -> None:
        return None

    def check_condition(self, condition: Any) -> None:
        if condition is not None:
            raise ValueError(f"condition={condition!r}: this network takes none.")

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        return example_inputs(self, batch)


ROW = Family(
    name="painter",
    network="toy_painter:ToyPainter",
    block="down|middle|up",
    parts={
        "blocks": "(down|middle|up)/(widen|narrow)",
        "film": "(down|middle|up)/film",
        "embedders": r"enter|time/mlp_\d",
        "joints": "join|values",
        "final": "leave",
        "convolutions": "(down|middle|up)/spread",
    },
    folds=(Fold("leave", (Producer("values"),)),),
    gelu_inputs="(down|middle|up)/narrow",
)
