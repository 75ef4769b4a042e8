"""One array: specs, ranges, packed codes, `QTensor`, and the quantizers of weights and inputs."""

from qdit_jax.errors import earlier_names
from qdit_jax.quant import adaptive_rounding, formats, packing, ranges
from qdit_jax.quant.act import (
    ActQuant,
    code_limits,
    codes_of,
    expand_to_channels,
    fake_quantize,
    grid_of_limits,
    group_extremes,
    select_timestep,
    static_act_quant,
    static_act_quant_of_limits,
)
from qdit_jax.quant.adaptive_rounding import AdaRoundSettings, adaround
from qdit_jax.quant.branches import true_after
from qdit_jax.quant.division import in_one_form, quotients_to_narrow, rounded_quotients
from qdit_jax.quant.expanding import expanded, expanded_params, is_packed
from qdit_jax.quant.finite import GREATEST_WEIGHT, check_finite
from qdit_jax.quant.gptq_rounding import accumulate_hessian, gptq, output_error, qdit_release_gptq
from qdit_jax.quant.groups import effective_group_size, map_groups, num_groups
from qdit_jax.quant.hadamard import regular_size, whole_size
from qdit_jax.quant.input_maps import InputMap, LowRank, Rotation
from qdit_jax.quant.leaves import LEAVES, Leaf, Role, entry_name, slots, with_leaf
from qdit_jax.quant.levels import BITS as LEVEL_BITS
from qdit_jax.quant.over_time import (
    OVER_TIME,
    UNQUANTIZED,
    BitsOverTime,
    Level,
    applied_over_time,
    bits_over_time,
    kernel_of_other,
    levels_over_time,
    other_kernel,
    with_act_bits,
    with_weight_bits,
)
from qdit_jax.quant.qtensor import (
    QTensor,
    from_codes,
    nbytes,
    packed_nbytes,
    quantize,
    scale_values,
    select_columns,
    step_and_offset,
    with_codes,
)
from qdit_jax.quant.readied import readied
from qdit_jax.quant.rows import code_rows, dequantize, integer_codes, level_rows, weight_rows
from qdit_jax.quant.specs import ActSpec, WeightSpec
from qdit_jax.quant.stored_scales import scale_value
from qdit_jax.quant.straight_through import StraightThrough, straight_through
from qdit_jax.quant.traced import fake_quantize_kernel_traced, fake_quantize_traced

# The name of `quantize` outside of this room, where `quantize` takes whole checkpoints too.
quantize_array = quantize


__all__ = [
    "GREATEST_WEIGHT",
    "LEAVES",
    "LEVEL_BITS",
    "OVER_TIME",
    "UNQUANTIZED",
    "ActQuant",
    "ActSpec",
    "AdaRoundSettings",
    "BitsOverTime",
    "InputMap",
    "Leaf",
    "Level",
    "LowRank",
    "QTensor",
    "Role",
    "Rotation",
    "StraightThrough",
    "WeightSpec",
    "accumulate_hessian",
    "adaptive_rounding",
    "adaround",
    "applied_over_time",
    "bits_over_time",
    "check_finite",
    "code_limits",
    "code_rows",
    "codes_of",
    "dequantize",
    "effective_group_size",
    "entry_name",
    "expand_to_channels",
    "expanded",
    "expanded_params",
    "fake_quantize",
    "fake_quantize_kernel_traced",
    "fake_quantize_traced",
    "formats",
    "from_codes",
    "gptq",
    "grid_of_limits",
    "group_extremes",
    "in_one_form",
    "integer_codes",
    "is_packed",
    "kernel_of_other",
    "level_rows",
    "levels_over_time",
    "map_groups",
    "nbytes",
    "num_groups",
    "other_kernel",
    "output_error",
    "packed_nbytes",
    "packing",
    "qdit_release_gptq",
    "quantize",
    "quantize_array",
    "quotients_to_narrow",
    "ranges",
    "readied",
    "regular_size",
    "rounded_quotients",
    "scale_value",
    "scale_values",
    "select_columns",
    "select_timestep",
    "slots",
    "static_act_quant",
    "static_act_quant_of_limits",
    "step_and_offset",
    "straight_through",
    "true_after",
    "weight_rows",
    "whole_size",
    "with_act_bits",
    "with_codes",
    "with_leaf",
    "with_weight_bits",
]

__getattr__ = earlier_names(__name__, {"gptq_authors": "qdit_release_gptq"})
