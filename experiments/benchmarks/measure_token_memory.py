"""The memory that one block of Wan 2.1 1.3B takes at 81 x 480 x 832: 32,760 tokens, W4A8 in bfloat16.

    python experiments/benchmarks/measure_token_memory.py --target v5e --out experiments/results/token_memory.json

Compiled for a TPU that is not here, and not run. Per row: bytes of temporaries, as the compiler plans
them, and every array that it keeps outside of a fusion and that is as large as the block's
activations, those in float32 first. The network has one block and its embedders and output layer, whose arrays are smaller; the
residual stream `[32760, 1536]` is float32, as published. What a row should not have is a float32 copy
of the inputs of a quantized layer: `[32760, 8960]` of `ffn_2`, 1.17 GB, is the one that would count.

Needs an environment of its own, Python 3.12 or newer: `pip install "jax[tpu]>=0.12"` and this package.
Expected: 1 to 3 minutes a row on 2 cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import time
from collections import Counter
from datetime import date
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
from qdit_jax.models import Wan

FRAMES, ROWS, COLUMNS = 21, 60, 104  # of latents
TOKENS, WIDTH = FRAMES * (ROWS // 2) * (COLUMNS // 2), 1536
ARRAY = re.compile(r"= (\w+)\[([\d,]*)\]\S* ([\w-]+)\(")
# Nothing new is written for these.
VIEWS = {"parameter", "bitcast", "get-tuple-element", "tuple", "while", "conditional", "reshape"}
ROWS_OF_TABLE = {
    "bfloat16, not quantized": (None, None, "simulated"),
    "w4a8, token x group 128, integer": ("w4a8", 128, "integer"),
    "w4a8, token x group 128, simulated": ("w4a8", 128, "simulated"),
    "w4a8, token, integer": ("w4a8", 0, "integer"),
    "w4a8, token, simulated": ("w4a8", 0, "simulated"),
    "w4a8-fast (token, two levels), integer": ("w4a8-fast", None, "integer"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="v5e", help="v5e, v5p, v6e (%(default)s)")
    parser.add_argument("--only", default="", help="part of the rows' names, such as integer")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    kept = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    topology = topologies.get_topology_desc(f"{args.target}:2x2", platform="tpu")
    place = SingleDeviceSharding(topology.devices[0])
    for name, settings in ROWS_OF_TABLE.items():
        key = f"{args.target}, {name}"
        if args.only in name and key not in kept:
            kept[key] = measured(*settings, place)
            print(key, json.dumps(kept[key]), flush=True)
            found = {"note": "compiled, not run", "tokens": TOKENS, "rows": kept}
            args.out.write_text(json.dumps({**found, "made": versions()}, indent=1) + "\n")


def measured(
    preset: str | None, act_group_size: int | None, numerics: str, place: SingleDeviceSharding
) -> dict[str, Any]:
    """Returns the bytes and the large float32 arrays of one program."""
    model = Wan(depth=1, dtype="bfloat16", numerics=numerics)
    params = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    if preset is not None:
        options = {} if act_group_size is None else {"act_group_size": act_group_size}
        recipe = qdit.Recipe.preset(preset, params, group_size=128, **options)
        params = jax.eval_shape(lambda params: qdit.quantize_params(params, recipe=recipe), params)

    def placed(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    given = jax.tree.map(placed, (params, *model.example_inputs()))
    began = time.perf_counter()
    done = jax.jit(lambda p, *inputs: model.apply({"params": p}, *inputs)).lower(*given).compile()
    memory = done.memory_analysis()
    arrays = large_arrays(done.as_text())
    return {
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 3),
        "argument_gb": round(memory.argument_size_in_bytes / 1e9, 3),
        "float32_arrays": {text: count for text, count in arrays.items() if text.startswith("f32")},
        "other_arrays": {
            text: count for text, count in arrays.items() if not text.startswith("f32")
        },
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def large_arrays(text: str) -> dict[str, int]:
    """Returns the arrays of a compiled program as large as `[32760, 1536]`, outside of fusions."""
    found: Counter[str] = Counter()
    inside = False
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = "fused" in line.split("(")[0]
        match = ARRAY.search(line)
        if inside or match is None or match[3] in VIEWS:
            continue
        shape = [int(n) for n in match[2].split(",") if n]
        if jnp.prod(jnp.array(shape or [1], jnp.float32)) >= TOKENS * WIDTH:
            found[f"{match[1]}{shape} {match[3]}"] += 1
    return dict(sorted(found.items()))


def versions() -> dict[str, str]:
    """Returns the date and the versions of what compiled."""
    names = ("jax", "jaxlib", "libtpu")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"date": date.today().isoformat(), **found}


if __name__ == "__main__":
    main()
