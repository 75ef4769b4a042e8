"""Writes a random network of a published size under its authors' names, as `.pt`, `.safetensors` or shards.

    python experiments/benchmarks/make_random_checkpoint.py dit_xl2.pt --model DiT-XL/2 --seed 0
    python experiments/benchmarks/make_random_checkpoint.py flux_dev --model flux-dev --dtype bfloat16

Names and shapes are those of `qdit bench --model NAME --dry-run`. Kernels have a few input channels with
larger weights, as trained ones do. What a fresh network has zeros in (adaLN, final layers) is random too,
so that every parameter matters to the output.

Expected: DiT-XL/2, 2.70 GB, in about half a minute on one core, with less than 0.3 GB of memory;
FLUX.1-dev in 16 bits, 23.8 GB, in about 8 minutes. torch is not needed.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from torch_file import Storage, Tensor, contiguous_strides, iter_chunks, write_torch_file

from qdit_convert import authors_shapes
from qdit_jax.models import published_named

Shape = tuple[int, ...]
CHUNK = 1 << 22
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LARGE_CHANNELS, LARGER = 0.01, 8.0  # a share of the input channels, and by how much
SHARD_NAME = "diffusion_pytorch_model-{:05d}-of-{:05d}.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, help="ends with .pt or .safetensors; else a folder of shards"
    )
    parser.add_argument("--model", default="DiT-XL/2", help="a published network (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--shard-gb", type=float, default=5, help="of a folder's files (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wrap", action="store_true", help="write {model, ema} (.pt only)")
    args = parser.parse_args()
    shapes = authors_shapes(published_named(args.model).build())
    tables = [
        {name: storage(name, shape, args.dtype, seed) for name, shape in shapes.items()}
        for seed in range(args.seed, args.seed + 1 + args.wrap)
    ]
    if args.out.suffix == ".safetensors":
        write_safetensors(args.out, tables[0], shapes)
    elif args.out.suffix == ".pt":
        content = [as_tensors(table, shapes) for table in tables]
        saved = {"ema": content[0], "model": content[1]} if args.wrap else content[0]
        write_torch_file(args.out, saved)
    else:
        write_shards(args.out, tables[0], shapes, args.shard_gb * 1e9)
    files = [args.out] if args.out.is_file() else list(args.out.iterdir())
    size = sum(file.stat().st_size for file in files)
    print(f"wrote {args.out}: {size:,} bytes, {len(shapes)} tensors")


def storage(name: str, shape: Shape, dtype: str, seed: int) -> Storage:
    """Returns the random values of one tensor, drawn when they are written."""
    return Storage(dtype, math.prod(shape), partial(draw, name, shape, DTYPES[dtype], seed))


def draw(name: str, shape: Shape, dtype: type, seed: int) -> Iterator[np.ndarray]:
    """Yields the values of one tensor: normal, scaled so that activations keep their size."""
    rng = np.random.default_rng([seed, *name.encode()])
    is_norm = len(shape) == 1 and name.endswith((".weight", ".scale"))
    fan_in = math.prod(shape[1:]) if name.endswith(".weight") and not is_norm else 0
    scale = 0.02 if fan_in == 0 or "embedding_table" in name else 0.5 / math.sqrt(fan_in)
    row = max(fan_in, 1)
    channels = np.full(row, scale, np.float32)
    if fan_in:
        channels[rng.random(row) < LARGE_CHANNELS] *= LARGER
    rows = max(CHUNK // row, 1)
    for count in iter_chunks(math.prod(shape) // row, rows):
        values = rng.standard_normal((count, row), dtype=np.float32) * channels
        yield (values + np.float32(is_norm)).astype(dtype).reshape(-1)


def as_tensors(table: Mapping[str, Storage], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    return {
        name: Tensor(stored, 0, shapes[name], contiguous_strides(shapes[name]))
        for name, stored in table.items()
    }


def write_shards(
    folder: Path, table: Mapping[str, Storage], shapes: Mapping[str, Shape], most_bytes: float
) -> None:
    """Writes the tensors to several files of a folder, and the index that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Storage]] = [{}]
    for name, stored in table.items():
        if shards[-1] and nbytes({**shards[-1], name: stored}) > most_bytes:
            shards.append({})
        shards[-1][name] = stored
    names = [SHARD_NAME.format(i + 1, len(shards)) for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, shard, shapes)
    places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": nbytes(table)}, "weight_map": places}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=1))


def nbytes(table: Mapping[str, Storage]) -> int:
    return sum(stored.count * np.dtype(DTYPES[stored.dtype]).itemsize for stored in table.values())


def write_safetensors(
    path: Path, table: Mapping[str, Storage], shapes: Mapping[str, Shape]
) -> None:
    """Writes the tensors one chunk at a time."""
    header, position = {}, 0
    for name, stored in table.items():
        end = position + nbytes({name: stored})
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
