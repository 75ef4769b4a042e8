"""Measures every preset of `qdit recipes` on the packaged model, each by the method that it is meant for.

    python experiments/tables/measure_presets.py

About 3 minutes on 2 free cores. Writes `qdit_jax/assets/presets.json`, which `qdit recipes` reads: closeness of the
final latents to full precision from the same noise and labels, in dB with its 95% interval over samples (DDIM,
guidance 1.5), and the bytes of all parameters. A preset that is there already is not measured again; remove the
file to measure all.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qdit_jax as qdit
from qdit_jax import metrics
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.demo import convert_packaged
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


def measured(row: NamedPreset, checkpoint: Checkpoint, full: np.ndarray, items: Any) -> dict:
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


def main() -> None:
    """Measures what is not in the file yet, and writes it after each preset."""
    kept = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = convert_packaged(Path(folder) / "digits")
    full = latents(checkpoint)
    items = qdit.collect_items(
        checkpoint,
        jax.random.key(1000),
        SETTINGS["num_items"],
        sampler=qdit.ddim(steps=SETTINGS["steps"]),
        guidance=SETTINGS["guidance"],
    )
    rows: dict[str, Any] = {}
    for name, row in NAMED.items():
        rows[name] = kept.get(name) or measured(row, checkpoint, full, items)
        print(name, rows[name])
        made = {**provenance(), "machine": "2-core CPU"}
        rest = {other: kept[other] for other in NAMED if other in kept and other not in rows}
        text = json.dumps({"made": made, "settings": SETTINGS, "rows": {**rows, **rest}}, indent=1)
        OUT.write_text(text + "\n")


if __name__ == "__main__":
    main()
