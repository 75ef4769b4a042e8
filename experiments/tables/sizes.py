"""Counts bytes and times of every family's published networks in every format; runs none of them.

    python experiments/tables/sizes.py
    python experiments/tables/sizes.py --only flux wan --batch 1 --out runs/sizes

What `qdit bench --model NAME --dry-run --batch 1` prints, for all of them: bytes of the weights, bytes
that a step needs at once beside them, and the time of a step at the full rates of devices. The rows are checked
against what the compilers of `accelerators/compile_ahead.py` said of DiT-XL/2: arguments and temporaries
of a step, in `experiments/results/compile_ahead.json`.

OUT/sizes.json is saved after every network, and the same command goes on from there; OUT/sizes.md is its
table. Three minutes of one core; 2026-11-27: `experiments/results/sizes.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from qdit_jax.models import Published, published_named
from qdit_jax.report import provenance
from qdit_jax.speed import DEVICES, abstract_checkpoint, devices_named, predicted, recipe_named

RESULTS = Path("experiments/results")
NAMES = (
    *("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2", "SiT-XL/2", "DiT-XL/2-512"),
    *("LightningDiT-XL/1", "PixArt-alpha-1024", "PixArt-Sigma-1024", "SD3-medium"),
    *("SD3.5-medium", "SD3.5-large", "FLUX.1-dev", "FLUX.1-schnell", "Sana-0.6B", "Sana-1.6B"),
    *("Sana-1.5-4.8B", "Z-Image-Turbo", "FLUX.2-klein-4B", "FLUX.2-klein-9B", "FLUX.2-dev"),
    *("Latte-XL/2", "Latte-1"),
    *("STDiT-16x256x256", "STDiT3-16x256x256", "STDiT3-51x480p", "Wan2.1-T2V-1.3B"),
    *("Wan2.1-T2V-14B", "Wan2.2-TI2V-5B", "Wan2.2-T2V-A14B"),
)
RECIPES = ("w8a8-fast", "w4a8-fast", "w4a8", "w4a16")
COLUMNS = {  # titles of the table's formats
    "float32": "float32",
    "bfloat16": "bfloat16",
    "w8a8-fast-g0": "W8A8",
    "w4a8-fast-g32": "W4A8, two levels",
    "w4a8-g128": "W4A8, groups of 128",
    "w4a16-g128": "W4A16",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names")
    parser.add_argument("--batch", type=int, default=1, help="samples of a step (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "sizes.json"
    kept = json.loads(file.read_text()) if file.exists() else {"networks": {}}
    for name in NAMES:
        if any(part.lower() in name.lower() for part in args.only) and name not in kept["networks"]:
            kept["networks"][name] = counted(published_named(name), args.batch)
            kept |= {"note": "predicted from shapes, not run", "made": provenance()}
            file.write_text(json.dumps(kept, indent=1) + "\n")
            print(name, flush=True)
    kept["check"] = checked(kept)
    file.write_text(json.dumps(kept, indent=1) + "\n")
    (args.out / "sizes.md").write_text(table(kept))
    print((args.out / "sizes.md").read_text())


def counted(row: Published, batch: int) -> dict[str, Any]:
    """Returns what is counted of one network, in every format."""
    model: Any = row.build()
    rows = predicted(
        abstract_checkpoint(model),
        [recipe_named(name) for name in RECIPES],
        [batch],
        row.calls,
        devices=devices_named(list(DEVICES)),
        dtype="bfloat16",
    )
    return {
        "samples": row.samples,
        "latents": list(model.sample_shape()),
        "calls": row.calls,
        "batch": batch,
        "formats": {found.title: dataclasses.asdict(found) for found in rows},
    }


def checked(kept: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what compilers said of steps of DiT-XL/2 beside what is counted."""
    file = RESULTS / "compile_ahead.json"
    if not file.exists() or "DiT-XL/2" not in kept["networks"]:
        return []
    formats = kept["networks"]["DiT-XL/2"]["formats"]
    titles = {"bfloat16": "bfloat16", "w8a8-fast": "w8a8-fast-g0", "w4a8-fast": "w4a8-fast-g32"}
    found = []
    for name, program in json.loads(file.read_text())["programs"].items():
        kind, step, batch, recipe, *_ = [*name.split(), "", ""]
        if step != "step" or batch != "1" or recipe not in titles:
            continue
        ours = formats[titles[recipe]]
        found.append(
            {
                "program": name,
                "weights_counted": ours["weight_bytes"],
                "arguments_compiled": program["argument_bytes"],
                "beside_counted": ours["live_bytes"].get(kind),
                "temporaries_compiled": program["temporary_bytes"],
            }
        )
    return found


def table(kept: dict[str, Any]) -> str:
    """Returns the Markdown tables: bytes, then times."""
    names = [name for name in NAMES if name in kept["networks"]]
    head = ["| network | sample |", "|---|---|"]
    lines = ["GB of weights; the last column is GB beside them in bfloat16, one sample.\n"]
    lines += [head[0] + f" {' | '.join(COLUMNS.values())} | beside |", head[1] + "---|" * 7]
    for name in names:
        row = kept["networks"][name]
        sizes = [f"{row['formats'][title]['weight_bytes'] / 1e9:.2f}" for title in COLUMNS]
        beside = max(row["formats"]["bfloat16"]["live_bytes"].values()) / 1e9
        lines.append(f"| {name} | {row['samples']} | {' | '.join(sizes)} | {beside:.2f} |")
    formats = [title for title in COLUMNS if title != "float32"]
    lines += [
        "\nMilliseconds of one step at full rates; in brackets where the memory is too small.\n",
        "| network | device | calls |",
    ]
    lines[-1] += f" {' | '.join(COLUMNS[title] for title in formats)} |"
    lines.append("|---|---|---|" + "---|" * len(formats))
    for name in names:
        for device in ("h100", "v5e", "v6e"):
            row = kept["networks"][name]
            cells = [time_text(row["formats"][title], device) for title in formats]
            lines.append(f"| {name} | {device} | {row['calls']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def time_text(row: dict[str, Any], device: str) -> str:
    """Returns the milliseconds, in brackets where the device's memory is too small."""
    text = f"{row['milliseconds'][device]:.3g}"
    if row["weight_bytes"] + row["live_bytes"][device] > DEVICES[device].memory:
        return f"({text})"
    return text


if __name__ == "__main__":
    main()
