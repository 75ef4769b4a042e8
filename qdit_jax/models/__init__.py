"""The networks, and the table from a family's name to its class."""

from qdit_jax.models.dit import SIZES, DiT, published_config
from qdit_jax.models.families import (
    FAMILIES,
    abstract_params,
    build_model,
    config_of,
    family_named,
    family_of,
    family_of_params,
)
from qdit_jax.models.family import (
    OPERANDS,
    OPERANDS_OF,
    Condition,
    Family,
    Fold,
    Network,
    Params,
    Producer,
    as_condition,
    example_inputs,
    is_concrete,
    layers_of,
)
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
    optional,
    sincos_positions,
    timestep_features,
)
from qdit_jax.models.taps import layers_in_order, rows_per_sample, seen_inputs, tapped
from qdit_jax.models.vae import AutoencoderKL

__all__ = [
    "DEMO_STATISTICS",
    "FAMILIES",
    "OPERANDS",
    "OPERANDS_OF",
    "SIZES",
    "AutoencoderKL",
    "Condition",
    "DiT",
    "Family",
    "FeaturesFn",
    "Fold",
    "InceptionV3",
    "Linear",
    "Network",
    "Params",
    "Producer",
    "TimestepEmbedder",
    "abstract_params",
    "as_condition",
    "asset",
    "build_model",
    "config_of",
    "demo_features_fn",
    "example_inputs",
    "family_named",
    "family_of",
    "family_of_params",
    "inception_features_fn",
    "is_concrete",
    "layers_in_order",
    "layers_of",
    "optional",
    "published_config",
    "rows_per_sample",
    "seen_inputs",
    "sincos_positions",
    "tapped",
    "timestep_features",
]
