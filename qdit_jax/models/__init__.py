"""The networks, and the table from a family's name to its class."""

from qdit_jax.models.calls import Call, module_calls, recorded_calls
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
    TABLE,
    Family,
    Fold,
    Network,
    Producer,
    as_condition,
    example_inputs,
    is_concrete,
    layers_of,
)
from qdit_jax.models.features import (
    DEMO_SIZE,
    DEMO_STATISTICS,
    DEMO_WEIGHTS,
    DigitFeatures,
    FeaturesFn,
    asset,
    demo_features_fn,
    i3d_features_fn,
    inception_features_fn,
)
from qdit_jax.models.i3d import BLOCKS as I3D_BLOCKS
from qdit_jax.models.i3d import I3D
from qdit_jax.models.inception import InceptionV3
from qdit_jax.models.layers import (
    AttentionModule,
    TimestepEmbedder,
    sincos_positions,
    timestep_features,
)
from qdit_jax.models.linear import (
    DTYPES,
    Layers,
    Linear,
    NetworkModule,
    check_dtype,
    mapped_input,
    optional,
    quantized_input,
)
from qdit_jax.models.runs import RUNS, apply_blocks, with_runs
from qdit_jax.models.taps import layers_in_order, rows_per_sample, seen_inputs, tapped
from qdit_jax.models.vae import AutoencoderKL

__all__ = [
    "DEMO_SIZE",
    "DEMO_STATISTICS",
    "DEMO_WEIGHTS",
    "DTYPES",
    "FAMILIES",
    "I3D",
    "I3D_BLOCKS",
    "OPERANDS",
    "OPERANDS_OF",
    "RUNS",
    "SIZES",
    "TABLE",
    "AttentionModule",
    "AutoencoderKL",
    "Call",
    "DiT",
    "DigitFeatures",
    "Family",
    "FeaturesFn",
    "Fold",
    "InceptionV3",
    "Layers",
    "Linear",
    "Network",
    "NetworkModule",
    "Producer",
    "TimestepEmbedder",
    "abstract_params",
    "apply_blocks",
    "as_condition",
    "asset",
    "build_model",
    "check_dtype",
    "config_of",
    "demo_features_fn",
    "example_inputs",
    "family_named",
    "family_of",
    "family_of_params",
    "i3d_features_fn",
    "inception_features_fn",
    "is_concrete",
    "layers_in_order",
    "layers_of",
    "mapped_input",
    "module_calls",
    "optional",
    "published_config",
    "quantized_input",
    "recorded_calls",
    "rows_per_sample",
    "seen_inputs",
    "sincos_positions",
    "tapped",
    "timestep_features",
    "with_runs",
]
