"""Post-training quantization: the transform of a parameter tree into a quantized one."""

from qdit_jax.errors import earlier_names
from qdit_jax.ptq.block_learning import ReconstructionSettings
from qdit_jax.ptq.finite_params import check_finite_params
from qdit_jax.ptq.over_time import (
    check_one_weight_format,
    num_passes,
    schedule_act_bits,
    scheduled_params,
)
from qdit_jax.ptq.promises import Precision, precision_of, precision_warning
from qdit_jax.ptq.reconstruction import num_reconstruction_batches, reconstruct_params
from qdit_jax.ptq.rewriting import rewrite_layers, weight_name
from qdit_jax.ptq.rounding import StagesFn, held_out_items, num_batches, round_params
from qdit_jax.ptq.sequential import (
    RoundedLayer,
    RoundFn,
    by_block,
    by_block_qdit_release,
    by_layer,
    quantize_in_order,
)
from qdit_jax.ptq.streaming import deferred_quantization, quantize_checkpoint
from qdit_jax.ptq.transform import (
    LayerPlan,
    act_quantizer,
    as_matrix,
    check_rounding_only,
    check_unquantized,
    matrix_shape,
    plan,
    quantize_params,
)
from qdit_jax.ptq.units import units_of

__all__ = [
    "LayerPlan",
    "Precision",
    "ReconstructionSettings",
    "RoundFn",
    "RoundedLayer",
    "StagesFn",
    "act_quantizer",
    "as_matrix",
    "by_block",
    "by_block_qdit_release",
    "by_layer",
    "check_finite_params",
    "check_one_weight_format",
    "check_rounding_only",
    "check_unquantized",
    "deferred_quantization",
    "held_out_items",
    "matrix_shape",
    "num_batches",
    "num_passes",
    "num_reconstruction_batches",
    "plan",
    "precision_of",
    "precision_warning",
    "quantize_checkpoint",
    "quantize_in_order",
    "quantize_params",
    "reconstruct_params",
    "rewrite_layers",
    "round_params",
    "schedule_act_bits",
    "scheduled_params",
    "units_of",
    "weight_name",
]

__getattr__ = earlier_names(__name__, {"by_block_authors": "by_block_qdit_release"})
