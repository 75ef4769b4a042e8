"""What `ptxas` says of a Mosaic GPU kernel, and what a layer takes at least, by arithmetic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qdit_jax.kernels import gpu_tiles, unit_of
from qdit_jax.quant import packed_nbytes
from qdit_jax.recipes import LayerSpec
from qdit_jax.speed import DEVICES

WAITS = "C7510", "C7512", "C7514"  # ptxas: "wgmma ... serialized" for one reason or another
H100 = DEVICES["h100"]
UNPACKING = 5  # instructions of a weight: its field, two of floats, and rounding
LANES, CLOCK = 128, 1.755e9  # instructions of a multiprocessor per cycle, and cycles per second


def emptied(folder: Path) -> None:
    """Removes the reports of the program before."""
    for file in folder.glob("*"):
        file.unlink()


def kernel_reports(folder: Path, kernel: str) -> list[dict[str, Any]]:
    """Returns registers, shared memory and grid of each kernel that was compiled since `emptied`.

    Raises:
        AssertionError: if one spills registers, waits for each product of tensor cores, needs more shared
            memory than there is, or has an empty grid.
    """
    reports = []
    for file in sorted(folder.glob(f"{kernel}*.ptxas")):
        said, dump = file.read_text(errors="replace"), launch_dump(file)
        report: dict[str, Any] = {
            "registers": numbers(r"Used (\d+) registers", said)[0],
            "spilled_bytes": check_compiled(file.name, said),
        }
        if dump is not None:
            report |= launch(file.name, dump.read_text(errors="replace"))
        if report not in reports:  # layers of one shape
            reports.append(report)
    return reports


def launch_dump(file: Path) -> Path | None:
    """Returns the dump of a kernel's launch; None if it was lowered for a program before, as equal ones are.

    Lowering and compiling count apart, so that numbers differ: kernels of one name are told by their order.
    """
    name = file.stem.rpartition("_")[0]

    def of_name(suffix: str) -> list[Path]:
        return sorted(file.parent.glob(f"{name}_*{suffix}"), key=lambda f: (len(f.name), f.name))

    compiled, lowered = of_name(".ptxas"), of_name(".before_layout_inference.txt")
    return lowered[compiled.index(file)] if len(lowered) == len(compiled) else None


def launch(name: str, passes: str) -> dict[str, Any]:
    """Returns shared memory and grid of a kernel; raises `AssertionError` for too much, or none."""
    found = {
        "shared_bytes": launched(passes, r"dynamic_shared_memory_size (%\w+)")[0],
        "grid": launched(passes, r"in \(%\w+ = (%\w+), %\w+ = (%\w+), %\w+ = (%\w+)\) threads"),
    }
    assert 0 < found["shared_bytes"] <= gpu_tiles.SHARED_MEMORY, f"{name}: {found}"
    assert min(found["grid"]) > 0, f"{name}: {found}"
    return found


def check_compiled(name: str, said: str) -> int:
    """Returns the bytes that a kernel spills, 0; raises `AssertionError` if it spills or waits."""
    spilled = sum(numbers(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said))
    assert spilled == 0, f"{name}: {said}"
    assert not any(code in said for code in WAITS), f"{name}: {said}"
    return spilled


def numbers(pattern: str, text: str) -> tuple[int, ...]:
    """Returns the whole numbers that a pattern captures where it first matches."""
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in {text[:500]}"
    return tuple(map(int, found.groups()))


def launched(text: str, pattern: str) -> list[int]:
    """Returns the constants of a kernel's launch that a pattern captures."""
    found = re.search(r"gpu\.launch .*" + pattern, text)
    assert found is not None, "the kernel's launch is not in its dump"
    constants = dict(re.findall(r"(%\w+) = arith\.constant (-?\d+) : \w+", text))
    return [int(constants[name]) for name in found.groups()]


def layer_roofline(rows: int, channels: int, width: int, spec: LayerSpec | None) -> float:
    """Returns the microseconds of a layer at an H100's full rates, inputs and outputs in bfloat16.

    Of a kernel the quantizer counts too: one pass that writes codes, two of XLA in groups not of 128. In groups every sum of a unit is converted, multiplied twice, and corrected if the inputs have zero points;
    full rates of that and of the tensor cores at once are assumed. Of weights alone, each block of rows
    unpacks all weights of its columns.
    """
    values, operations = rows * (channels + width), 2 * rows * channels * width
    if spec is None:
        moved = 2 * (values + channels * width)
        return microseconds(operations, "bfloat16", moved)
    act, weight = spec.act, spec.weight
    if act is None:
        moved = 2 * values + packed_nbytes(channels, width, weight)
        shape = gpu_tiles.Shape(
            *(rows, channels, width, weight.bits, 2),
            unit_of(channels, weight.group_size, weight.group_size),
            x_bits=16,
        )
        times = -(-rows // gpu_tiles.tiles_by_arithmetic(shape).rows)  # each weight is unpacked
        unpacking = at_full_issue(times * channels * width * UNPACKING)
        return round(max(microseconds(operations, "bfloat16", moved), unpacking), 2)
    is_grouped = not weight.has_levels and weight.group_size
    is_by_xla = is_grouped and act.group_size != gpu_tiles.RUN
    quantizer = microseconds(0, "int8", rows * channels * (2 + (2 if is_by_xla else 0) + 1))
    moved = rows * channels + 2 * rows * width + packed_nbytes(channels, width, weight)
    product = microseconds(operations, "int8" if weight.fmt is None else "float8", moved)
    if is_grouped:
        unit = unit_of(channels, act.group_size, weight.group_size)
        each = 3 if act.symmetric else 4
        instructions = rows * width * (channels // unit) * each
        product = max(product, at_full_issue(instructions))
    return round(quantizer + product, 2)


def at_full_issue(instructions: float) -> float:
    """Returns the microseconds of instructions, those of single numbers, at the full rate."""
    return 1e6 * instructions / (gpu_tiles.MULTIPROCESSORS * LANES * CLOCK)


def microseconds(operations: float, dtype: str, moved: float) -> float:
    """Returns the larger of operations at the full rate and bytes at the full bandwidth."""
    return round(1e6 * max(operations / H100.rates[dtype], moved / H100.bandwidth), 2)
