"""One array: specs, ranges, packed codes, `QTensor`, and the quantisers of weights and inputs."""

from qdit_jax.quant import formats, packing, ranges
from qdit_jax.quant.act import (
    ActQuant,
    fake_quantize,
    group_extremes,
    select_rows,
    select_timestep,
    static_act_quant,
)
from qdit_jax.quant.adaptive_rounding import AdaRoundSettings, adaround
from qdit_jax.quant.finite import check_finite
from qdit_jax.quant.gptq_rounding import accumulate_hessian, gptq, gptq_authors, output_error
from qdit_jax.quant.qtensor import (
    QTensor,
    dequantize,
    from_codes,
    integer_codes,
    nbytes,
    packed_nbytes,
    quantize,
    scale_values,
    select_columns,
)
from qdit_jax.quant.specs import ActSpec, WeightSpec
from qdit_jax.quant.traced import fake_quantize_kernel_traced, fake_quantize_traced

__all__ = [
    "ActQuant",
    "ActSpec",
    "AdaRoundSettings",
    "QTensor",
    "WeightSpec",
    "accumulate_hessian",
    "adaround",
    "check_finite",
    "dequantize",
    "fake_quantize",
    "fake_quantize_kernel_traced",
    "fake_quantize_traced",
    "formats",
    "from_codes",
    "gptq",
    "gptq_authors",
    "group_extremes",
    "integer_codes",
    "nbytes",
    "output_error",
    "packed_nbytes",
    "packing",
    "quantize",
    "ranges",
    "scale_values",
    "select_columns",
    "select_rows",
    "select_timestep",
    "static_act_quant",
]
