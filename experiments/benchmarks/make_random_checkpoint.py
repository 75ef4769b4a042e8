"""Writes a random DiT of any published size in the facebook layout, as `.pt` or `.safetensors`.

    python experiments/benchmarks/make_random_checkpoint.py dit_xl2.pt --model DiT-XL/2 --seed 0

Expected: 2.70 GB in about half a minute on one core, with less than 0.3 GB of memory; torch is not
needed. adaLN and the final layer are random too (a fresh DiT has zeros there), so that every
parameter matters to the output.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from torch_file import Storage, Tensor, contiguous_strides, iter_chunks, write_torch_file

SIZES = {"S": (12, 384), "B": (12, 768), "L": (24, 1024), "XL": (28, 1152)}
CHUNK = 1 << 22
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="ends with .pt or .safetensors")
    parser.add_argument("--model", default="DiT-XL/2", help="DiT-S/2 to DiT-XL/8")
    parser.add_argument("--input-size", type=int, default=32, help="rows of the latent")
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrap", action="store_true", help="write {model, ema} (.pt only)")
    args = parser.parse_args()
    shapes = dit_shapes(args.model, args.input_size, args.num_classes)
    tables = [
        {name: storage(name, shape, args.dtype, seed) for name, shape in shapes.items()}
        for seed in range(args.seed, args.seed + 1 + args.wrap)
    ]
    if args.out.suffix == ".safetensors":
        write_safetensors(args.out, tables[0], shapes)
    else:
        content = [as_tensors(table, shapes) for table in tables]
        saved = {"ema": content[0], "model": content[1]} if args.wrap else content[0]
        write_torch_file(args.out, saved)
    print(f"wrote {args.out}: {args.out.stat().st_size:,} bytes, {len(shapes)} tensors")


def dit_shapes(model: str, input_size: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of a published DiT, in the order of its file."""
    size, _, patch = model.removeprefix("DiT-").partition("/")
    (depth, d), p = SIZES[size], int(patch)
    tokens = (input_size // p) ** 2
    layers = {"t_embedder.mlp.0": (d, 256), "t_embedder.mlp.2": (d, d)}
    for i in range(depth):
        block = f"blocks.{i}"
        layers |= {f"{block}.attn.qkv": (3 * d, d), f"{block}.attn.proj": (d, d)}
        layers |= {f"{block}.mlp.fc1": (4 * d, d), f"{block}.mlp.fc2": (d, 4 * d)}
        layers |= {f"{block}.adaLN_modulation.1": (6 * d, d)}
    layers |= {"final_layer.linear": (p * p * 8, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, d),
        "x_embedder.proj.weight": (d, 4, p, p),
        "x_embedder.proj.bias": (d,),
        "y_embedder.embedding_table.weight": (num_classes + 1, d),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def storage(name: str, shape: tuple[int, ...], dtype: str, seed: int) -> Storage:
    """Returns the random values of one tensor, drawn when they are written."""
    return Storage(dtype, math.prod(shape), partial(draw, name, shape, DTYPES[dtype], seed))


def draw(name: str, shape: tuple[int, ...], dtype: type, seed: int) -> Iterator[np.ndarray]:
    """Yields the values of one tensor: normal, scaled so that activations keep their size."""
    key = [seed, *name.encode()]
    rng = np.random.default_rng(key)
    fan_in = math.prod(shape[1:]) if name.endswith(".weight") else 0
    scale = 0.02 if fan_in == 0 or "embedding" in name else 0.5 / math.sqrt(fan_in)
    for count in iter_chunks(math.prod(shape), CHUNK):
        yield (rng.standard_normal(count, dtype=np.float32) * np.float32(scale)).astype(dtype)


def as_tensors(table: dict[str, Storage], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {
        name: Tensor(stored, 0, shapes[name], contiguous_strides(shapes[name]))
        for name, stored in table.items()
    }


def write_safetensors(
    path: Path, table: dict[str, Storage], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Writes the tensors one chunk at a time."""
    header, position = {}, 0
    for name, stored in table.items():
        end = position + stored.count * np.dtype(DTYPES[stored.dtype]).itemsize
        header[name] = {
            "dtype": SAFETENSORS_NAMES[stored.dtype],
            "shape": list(shapes[name]),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for stored in table.values():
            for chunk in stored.chunks():
                file.write(chunk.view(np.uint8).data)


if __name__ == "__main__":
    main()
