"""One array: specs, ranges, packed codes, `QTensor`, and the quantisers of weights and inputs."""

from qdit_jax.quant import formats, packing, ranges
from qdit_jax.quant.qtensor import (
    QTensor,
    dequantize,
    from_codes,
    integer_codes,
    nbytes,
    packed_nbytes,
    quantize,
)
from qdit_jax.quant.specs import ActSpec, WeightSpec

__all__ = [
    "ActSpec",
    "QTensor",
    "WeightSpec",
    "dequantize",
    "formats",
    "from_codes",
    "integer_codes",
    "nbytes",
    "packed_nbytes",
    "packing",
    "quantize",
    "ranges",
]
