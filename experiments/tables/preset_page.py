"""Writes docs/ready-recipes.md from the table of presets and what was measured of them.

    python experiments/tables/preset_page.py

Takes seconds. Run it after `measure_presets.py`, or after a row of the table is changed; a test holds the page
against both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdit_jax.recipes import NAMED, NamedPreset, measured_presets

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ready-recipes.md"
TOP = """\
<!-- Written by experiments/tables/preset_page.py from the table of presets. -->

# Ready recipes

A preset is a recipe by name: it fits every network of the table, and says which product of which hardware it makes.
`qdit recipes` lists them, `qdit recipes xl2` counts what each costs on your checkpoint.

```bash
qdit recipes xl2
qdit quantize xl2 xl2-fast --recipe w4a8-fast --method best
```

| preset | take it for | product of a layer | method | closeness, dB (95%) | bytes |
|---|---|---|---|---|---|
"""
BOTTOM = """\

Measured on the packaged digit model by `experiments/tables/measure_presets.py` ({day}, {machine}, jax {jax};
{num_samples} samples, {steps} DDIM steps, guidance {guidance}, {num_items} trajectories to calibrate on). Full precision has 7,492,736 bytes. Twenty samples separate presets that are several dB apart, no others,
and how they rank on this model is no promise for yours: [evaluation](evaluation.md).

Beside these there is `w<bits>a<bits>`, 2 to 8 bits a side or 16, with `-fast` and `-all`:
[choosing a recipe](recipes.md). A setting that you give (`--group-size`, in Python `group_size=`) comes before the
preset's own. `fp8_e4m3` has a kernel for NVIDIA's Hopper ([compiled, not run](kernels.md#sums-of-fp8)); no other format of the FP4
and FP8 rows has one: XLA computes them exactly, and hardware that multiplies them is not used yet.

## Found by search

`experiments/recipes` has recipes that `qdit search` found on the packaged model, with the commands that made them.
They name layers of that model, so they show what a search finds rather than serve another network; search on yours.
"""


def page() -> str:
    """Returns the text of the page."""
    figures = measured_presets()
    made = figures["made"]
    rows = "".join(map(line, NAMED.values(), [figures["rows"].get(name) for name in NAMED]))
    return (
        TOP
        + rows
        + BOTTOM.format(
            **figures["settings"], day=made["date"][:10], machine=made["machine"], jax=made["jax"]
        )
    )


def line(preset: NamedPreset, row: dict[str, Any] | None) -> str:
    """Returns a preset's line of the table."""
    shown = "not measured | "
    if row is not None:
        db = row["closeness_db"]
        shown = f"{db['estimate']:.1f} ({db['low']:.1f} to {db['high']:.1f}) | {row['bytes']:,}"
    return (
        f"| `{preset.name}` | {preset.idea} | {preset.hardware} | `{preset.method}` | {shown} |\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
