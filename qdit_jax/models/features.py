"""Feature networks as functions of uint8 images, and the small network in the package.

Dimensions: B batch, H and W rows and columns, C channels, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float
from safetensors.numpy import load

from qdit_jax.models.i3d import I3D, video_input
from qdit_jax.models.inception import InceptionV3, preprocess
from qdit_jax.types import AnyArray, Params

FeaturesFn = Callable[[np.ndarray], Mapping[str, Any]]

DEMO_SIZE = 16
DEMO_WEIGHTS = "features.safetensors"
DEMO_STATISTICS = "features_stats.npz"


class DigitFeatures(nn.Module):
    """A small classifier of gray digits whose penultimate layer serves as features.

    Takes images in [-1, 1] of any size from 8; gives a dict of `pool [B, num_features]`,
    `logits` and `probabilities [B, num_classes]`.
    """

    widths: tuple[int, ...] = (32, 64, 64, 96)
    strides: tuple[int, ...] = (1, 2, 1, 2)
    num_features: int = 64
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Float[AnyArray, "B H W 1"]) -> dict[str, Array]:
        x = jnp.asarray(x)
        for i, (width, stride) in enumerate(zip(self.widths, self.strides, strict=True)):
            x = nn.Conv(width, (3, 3), strides=stride, name=f"conv_{i}")(x)
            x = nn.gelu(nn.GroupNorm(8, use_fast_variance=False, name=f"norm_{i}")(x))
        features = nn.gelu(nn.Dense(self.num_features, name="features")(x.mean((1, 2))))
        logits = nn.Dense(self.num_classes, name="classifier")(features)
        return {"pool": features, "logits": logits, "probabilities": jax.nn.softmax(logits)}


def demo_features_fn(weights: Path | None = None) -> FeaturesFn:
    """Returns the packaged digit features as a function of uint8 images `[B, 16, 16, 1 or 3]`.

    `weights` replaces the packaged file. Scores from it are "Fréchet distance (demo features)" and the like, never FID.
    """
    params = load_params((weights or asset(DEMO_WEIGHTS)).read_bytes())

    @jax.jit
    def features(params: Params, images: Array) -> dict[str, Array]:
        found = DigitFeatures().apply({"params": params}, images[..., :1] / 127.5 - 1)
        return cast(dict[str, Array], found)

    def checked(images: np.ndarray) -> dict[str, Array]:
        check_digits(images)
        return features(params, jnp.asarray(images, jnp.float32))

    return checked


def inception_features_fn(params: Params, *, half_pixel: bool = False) -> FeaturesFn:
    """Returns Inception's features as a function of uint8 images `[B, H, W, 1 or 3]`.

    `half_pixel` chooses the preprocessing of the common PyTorch port (see `inception.preprocess`).
    """

    @jax.jit
    def features(params: Params, images: Array) -> dict[str, Array]:
        found = InceptionV3().apply({"params": params}, preprocess(images, half_pixel=half_pixel))
        return cast(dict[str, Array], found)

    return lambda images: features(params, jnp.asarray(images))


def i3d_features_fn(params: Params) -> FeaturesFn:
    """Returns I3D's features as a function of uint8 videos `[B, T, H, W, 1 or 3]`, 9 frames or more."""

    @jax.jit
    def features(params: Params, videos: Array) -> dict[str, Array]:
        found = I3D().apply({"params": params}, video_input(videos))
        return cast(dict[str, Array], found)

    return lambda videos: features(params, jnp.asarray(videos))


def check_digits(images: np.ndarray) -> None:
    """Raises `ValueError` unless images are those that the packaged network was trained on."""
    if images.ndim != 4 or images.shape[1:3] != (DEMO_SIZE, DEMO_SIZE):
        raise ValueError(
            f"images are {'x'.join(map(str, images.shape[1:-1]))}; the demo features take digits of "
            f"{DEMO_SIZE}x{DEMO_SIZE}; use Inception's features for other pictures."
        )
    if images.shape[-1] == 3 and (images != images[..., :1]).any():
        raise ValueError("images are in color; the demo features take gray digits.")


def asset(name: str) -> Traversable:
    """Returns the packaged file `name`."""
    return resources.files("qdit_jax") / "assets" / name


def load_params(data: bytes) -> dict[str, Any]:
    """Returns a parameter tree in float32 from safetensors whose names are paths."""
    flat = {tuple(k.split("/")): v.astype(np.float32) for k, v in load(data).items()}
    return unflatten_dict(flat)
