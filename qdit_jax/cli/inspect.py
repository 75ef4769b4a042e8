"""`qdit inspect`: what is in a checkpoint, or in a PyTorch file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = """\
Show what a checkpoint folder holds, or what `qdit convert` would make of a PyTorch file.

examples:
  qdit inspect xl2-w4a8
  qdit inspect xl2-w4a8 --json
  qdit inspect DiT-XL-2-256x256.pt
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what a checkpoint or a PyTorch file holds",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a checkpoint folder or a file")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from qdit_jax.checkpoint import read_description

    if (args.path / "model.json").is_file():
        summary = summarize(args.path, read_description(args.path))
    else:
        from qdit_convert import describe

        summary = describe(args.path)
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        print_tree(summary)


def summarize(folder: Path, description: dict[str, Any]) -> dict[str, Any]:
    """Returns the family, configuration, counts, bytes by part, and recipe of a checkpoint."""
    parts: dict[str, dict[str, Any]] = {}
    for path, leaf in description["params"].items():
        part = parts.setdefault(part_of(path), {"values": 0, "bytes": 0, "dtypes": {}})
        arrays = [leaf] if leaf["type"] == "array" else list(leaf["arrays"].values())
        if leaf["type"] != "ActQuant":
            part["values"] += product(leaf["shape"])
        for array in arrays:
            size = product(array["shape"]) * itemsize(array["dtype"])
            part["bytes"] += size
            kind = f"{leaf['bits']}-bit" if leaf["type"] == "QTensor" else array["dtype"]
            part["dtypes"][kind] = part["dtypes"].get(kind, 0) + size
    summary = {
        "path": str(folder),
        "family": description["family"],
        "config": description["config"],
        "values": sum(part["values"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
        "metadata": description.get("metadata", {}),
    }
    if (folder / "recipe.json").exists():
        summary["recipe"] = json.loads((folder / "recipe.json").read_text())
    if (folder / "vae" / "model.json").is_file():
        from qdit_jax.checkpoint import read_description

        summary["vae"] = summarize(folder / "vae", read_description(folder / "vae"))
    return summary


def part_of(path: str) -> str:
    """Returns the kind of layer a parameter belongs to, the same for all blocks."""
    names = path.split("/")
    if names[0].startswith("blocks_"):
        return "blocks/" + "/".join(names[1:-1])
    return names[0]


def product(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def itemsize(dtype: str) -> int:
    import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
    import numpy as np

    return np.dtype(dtype).itemsize


def print_tree(value: Any, indent: str = "") -> None:
    """Prints nested dicts as indented lines; long lists and rules on one line each."""
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            print(f"{indent}{key}:")
            print_tree(entry, indent + "  ")
        elif isinstance(entry, list) and entry and isinstance(entry[0], dict):
            print(f"{indent}{key}:")
            for item in entry:
                print(f"{indent}  {json.dumps(item)}")
        elif isinstance(entry, int) and not isinstance(entry, bool) and entry > 9999:
            print(f"{indent}{key}: {entry:,}")
        else:
            print(f"{indent}{key}: {entry}")
