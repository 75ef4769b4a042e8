"""The networks, and the table from a family's name to its class."""

from qdit_jax.models.dit import SIZES, DiT, published_config
from qdit_jax.models.family import abstract_params, build_model, config_of, family_of
from qdit_jax.models.features import (
    DEMO_STATISTICS,
    FeaturesFn,
    asset,
    demo_features_fn,
    inception_features_fn,
)
from qdit_jax.models.inception import InceptionV3
from qdit_jax.models.layers import (
    Linear,
    TimestepEmbedder,
    mapped_input,
    optional,
    quantized_input,
    sincos_positions,
    timestep_features,
)
from qdit_jax.models.vae import AutoencoderKL

__all__ = [
    "DEMO_STATISTICS",
    "SIZES",
    "AutoencoderKL",
    "DiT",
    "FeaturesFn",
    "InceptionV3",
    "Linear",
    "TimestepEmbedder",
    "abstract_params",
    "asset",
    "build_model",
    "config_of",
    "demo_features_fn",
    "family_of",
    "inception_features_fn",
    "mapped_input",
    "optional",
    "published_config",
    "quantized_input",
    "sincos_positions",
    "timestep_features",
]
