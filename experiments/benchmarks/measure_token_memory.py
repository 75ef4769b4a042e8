"""The memory that quantized layers of Wan 2.1 1.3B take at 81 x 480 x 832: 32,760 tokens, W4A8, bfloat16.

    python experiments/benchmarks/measure_token_memory.py --out experiments/results/token_memory.json

Compiled for a TPU that is not here, and not run. Per layer and quantizer: the bytes of temporaries that the
compiler plans beside the input and the output in bfloat16, and those that one whole float32 copy of the
wider of both would take. Attention is not part of it: where no fused kernel fits a number of tokens, its
weights take far more.

Needs an environment of its own, Python 3.12 or newer: `pip install "jax[tpu]>=0.12"` and this package.
Expected: 5 seconds a row on 2 cores; temporaries well below the copy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

# Read when JAX looks for devices: the host's CPU, and no TPU to ask or to log to.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_LOG_DIR", "disabled")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import qdit_jax as qdit
from qdit_jax.kernels import quantized_matmul
from qdit_jax.quant import ActQuant, ActSpec, WeightSpec
from qdit_jax.report import provenance

TOKENS = 21 * 30 * 52
LAYERS = {"qkv": (1536, 4608), "ffn_0": (1536, 8960), "ffn_2": (8960, 1536)}
ACTS = {"token x group 128": 128, "token": 0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="v5e", help="v5e, v5p, v6e (%(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    topology = topologies.get_topology_desc(f"{args.target}:2x2", platform="tpu")
    place = SingleDeviceSharding(topology.devices[0])
    rows: dict[str, Any] = {}
    for layer, (channels, width) in LAYERS.items():
        for act, size in ACTS.items():
            for numerics in ("integer", "simulated"):
                name = f"{layer}, {act}, {numerics}"
                rows[name] = measured(channels, width, size, numerics, place)
                print(name, rows[name], flush=True)
                found = {"note": "compiled, not run", "target": args.target, "tokens": TOKENS}
                text = json.dumps({**found, "rows": rows, "made": versions()}, indent=1)
                args.out.write_text(text + "\n")


def measured(
    channels: int, width: int, group_size: int, numerics: str, place: SingleDeviceSharding
) -> dict[str, float]:
    """Returns the megabytes of temporaries of one product, and of a whole float32 copy."""
    weight = WeightSpec(bits=4, group_size=128)
    act = ActQuant(ActSpec(bits=8, group_size=group_size))
    kernel = jax.ShapeDtypeStruct((channels, width), jnp.float32)
    q = jax.eval_shape(lambda w: qdit.quantize_array(w, weight), kernel)
    x = jax.ShapeDtypeStruct((1, TOKENS, channels), jnp.bfloat16)

    def placed(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def product(x: Any, q: Any) -> Any:
        return quantized_matmul(x, q, act, numerics, "xla")

    done = jax.jit(product).lower(*jax.tree.map(placed, (x, q))).compile()
    return {
        "temporary_mb": round(done.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "float32_copy_mb": round(4 * TOKENS * max(channels, width) / 1e6, 1),
    }


def versions() -> dict[str, str]:
    """Returns the date, the machine and the versions of what compiled."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {**provenance(), **found}


if __name__ == "__main__":
    main()
