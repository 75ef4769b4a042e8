"""Measures every preset of `qdit recipes` on the packaged model, each by the method that it is meant for.

    python experiments/tables/measure_presets.py [NAME ...]

About 3 minutes on 2 free cores. Writes `qdit_jax/assets/presets.json`, which `qdit recipes` reads: closeness of the
final latents to full precision from the same noise and labels, in dB with its 95% interval over samples (DDIM,
guidance 1.5), and the bytes of all parameters. A preset that is there already is not measured again; remove the
file to measure all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np

import qdit_jax as qdit
from qdit_jax import metrics
from qdit_jax.calibration import Items
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.demo import PACKAGED
from qdit_jax.recipes import NAMED, NamedPreset
from qdit_jax.report import provenance

OUT = Path(qdit.__file__).parent / "assets" / "presets.json"
SETTINGS = {"num_samples": 20, "steps": 20, "guidance": 1.5, "seed": 0, "num_items": 16}


def latents(checkpoint: Checkpoint) -> np.ndarray:
    """Returns the final latents of all samples, digits in turn."""
    labels = np.arange(SETTINGS["num_samples"]) % 10
    sampler = qdit.ddim(steps=SETTINGS["steps"])
    return qdit.generate(
        checkpoint,
        sampler,
        labels,
        seed=SETTINGS["seed"],
        guidance=SETTINGS["guidance"],
        batch_size=20,
        decode_fn=None,
    )


def measured(row: NamedPreset, checkpoint: Checkpoint, full: np.ndarray, items: Items) -> dict:
    """Returns what one preset costs and gives."""
    data = qdit.CalibrationData(items=items, num_samples=SETTINGS["num_items"], batch_size=32)
    recipe = qdit.Recipe.preset(row.name, checkpoint)
    small = qdit.quantize(checkpoint, method=row.method, recipe=recipe, data=data)
    db = metrics.bootstrap_interval(metrics.signal_to_noise_db(full, latents(small)))
    return {
        "method": row.method,
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(small.params)),
        "closeness_db": {"estimate": db.estimate, "low": db.low, "high": db.high},
        "date": provenance()["date"][:10],
    }


def references(checkpoint: Checkpoint, work: Path) -> tuple[np.ndarray, Items]:
    """Returns the samples of full precision and inputs to calibrate on, kept in a folder."""
    full, items = work / "full.npy", work / "items.npz"
    if not full.exists():
        np.save(full, latents(checkpoint))
    if not items.exists():
        sampler, guidance = qdit.ddim(steps=SETTINGS["steps"]), SETTINGS["guidance"]
        count = SETTINGS["num_items"]
        key = jax.random.key(1000)
        found = qdit.collect_items(checkpoint, key, count, sampler=sampler, guidance=guidance)
        found.save(items)
    return np.load(full), Items.load(items)


def main() -> None:
    """Measures what is named and not in the file yet, and writes it after each preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="presets (all)", metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path("runs/presets"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = PACKAGED["digits"].convert(args.work / "digits")
    full, items = references(checkpoint, args.work)
    for name in args.names or NAMED:
        rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
        if name in rows:
            continue
        rows[name] = measured(NAMED[name], checkpoint, full, items)
        print(name, rows[name], flush=True)
        made = provenance()
        ordered = {other: rows[other] for other in NAMED if other in rows}
        text = json.dumps({"made": made, "settings": SETTINGS, "rows": ordered}, indent=1)
        OUT.write_text(text + "\n")


if __name__ == "__main__":
    main()
