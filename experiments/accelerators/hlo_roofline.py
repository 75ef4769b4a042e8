"""The least time of a compiled program on an H100, operation by operation, from the compiler's own text.

Of each operation the larger of its products at the device's full rate and its bytes at full bandwidth: what it
reads, of a slice only the slice, and what it writes. Nothing is fused in thought: what the compiler writes
and reads again counts. Programs take longer, by the time between operations too, whose number is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from qdit_jax.speed import DEVICES

H100 = DEVICES["h100"]
ITEMSIZE = {
    **{"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1},
    **{"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8},
}
RATES = {
    **{"s8": "int8", "bf16": "bfloat16", "f32": "float32"},
    **{"f8e4m3fn": "float8", "f8e5m2": "float8"},
}
FREE = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all"}
SLICES = ("slice", "dynamic-slice")


class Operation(NamedTuple):
    """One line of a program: its name, the text of its type, its kind, what it reads, and the line."""

    name: str
    type: str
    kind: str
    operands: list[str]
    line: str


Computation = dict[str, Operation]


def step_roofline(text: str) -> dict[str, float]:
    """Returns the microseconds of a program, those of products and of attention alone, and its operations.

    Raises:
        AssertionError: if the program has a loop, whose rounds are not counted here.
    """
    computations = dict(parsed(text))
    entry = computations["ENTRY"]
    spent = {"products": 0.0, "attention": 0.0, "others": 0.0}
    count = 0
    for operation in entry.values():
        assert operation.kind != "while", "a loop, whose rounds are not counted"
        if operation.kind in FREE:
            continue
        count += 1
        kind, seconds = least_seconds(operation, entry, computations)
        spent[kind] += 1e6 * seconds
    rounded = {f"{kind}_us": round(value, 1) for kind, value in spent.items()}
    return {"us": round(sum(spent.values()), 1), **rounded, "operations": count}


def parsed(text: str) -> Iterator[tuple[str, Computation]]:
    """Yields the computations of a program by name, that of the program itself as ENTRY."""
    name, found = None, {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, found = "ENTRY" if head[1] else head[2], {}
        elif line.startswith("}") and name is not None:
            yield name, found
            name = None
        elif name is not None and (match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*)$", line)):
            type_, kind, operands = split_line(match[2])
            found[match[1]] = Operation(match[1], type_, kind, operands, line)


def split_line(rest: str) -> tuple[str, str, list[str]]:
    """Returns type, kind and operands of what stands behind the equals sign."""
    match = re.match(r"(\(.*?\)|\S+) ([\w\-]+)\((.*)$", rest)
    assert match is not None, rest
    arguments = re.split(r"\)(?:, |$)", match[3], maxsplit=1)[0]
    return match[1], match[2], re.findall(r"%([\w.\-]+)", arguments)


def least_seconds(
    operation: Operation, entry: Computation, computations: dict[str, Computation]
) -> tuple[str, float]:
    """Returns what kind of work an operation is, and the least time that it takes."""
    moved = size(written(operation))
    for index, name in enumerate(operation.operands):
        moved += read_bytes(operation, index, entry[name], computations)
    number, dtype, kind = multiplied(operation, entry, computations)
    at_rate = number / H100.rates[RATES[dtype]] if number else 0.0
    return kind, max(at_rate, moved / H100.bandwidth)


def written(operation: Operation) -> str:
    """Returns the type of what an operation writes: of a product of cuBLAS not its workspace."""
    if "cublas" not in operation.line:
        return operation.type
    found = re.match(r"\(?(\w+\[[\d,]*\])", operation.type)
    assert found is not None, operation.type
    return found[1]


def read_bytes(
    operation: Operation, index: int, operand: Operation, computations: dict[str, Computation]
) -> float:
    """Returns the bytes that an operation reads of an operand: of slices alone those."""
    whole = size(operand.type)
    inside = computations.get(called(operation))
    if inside is None:
        return whole
    parameters = [
        o for o in inside.values() if o.kind == "parameter" and f"parameter({index})" in o.line
    ]
    users = [u for p in parameters for u in users_of(p.name, inside)]
    if users and all(user.kind in SLICES for user in users):
        return min(whole, sum(size(user.type) for user in users))
    return whole


def users_of(name: str, inside: Computation) -> list[Operation]:
    """Returns what uses a value, renamed or not."""
    found = []
    for operation in inside.values():
        if name in operation.operands:
            renames = operation.kind == "bitcast"
            found += users_of(operation.name, inside) if renames else [operation]
    return found


def multiplied(
    operation: Operation, entry: Computation, computations: dict[str, Computation]
) -> tuple[float, str, str]:
    """Returns the operations of an operation's products, the dtype of their operands, and its kind."""
    line = operation.line
    if "fmha" in line:  # q, k, v: [B, T, heads, channels]
        (batch, queries, heads, channels), keys = (
            shape(entry[operation.operands[i]].type)[1] for i in (0, 1)
        )
        return 4.0 * batch * heads * queries * keys[1] * channels, "bf16", "attention"
    if "mosaic_gpu" in line:
        dtype = shape(entry[operation.operands[0]].type)[0]
        if operation.type.startswith(("(s8", "(f8")):  # codes and scales: the quantizer
            return 0.0, dtype, "others"
        number = re.search(r"flops\\22: (\d+)", line)
        assert number is not None, line
        return float(number[1]), dtype, "products"
    if "cublas" in line:
        dtype, left = shape(entry[operation.operands[0]].type)
        axis = re.search(r'"lhs_contracting_dimensions":\["(\d+)"\]', line)
        assert axis is not None, line
        return 2.0 * math.prod(shape(operation.type)[1]) * left[int(axis[1])], dtype, "products"
    inside = computations.get(called(operation), {})
    dots = [(o, inside) for o in inside.values() if o.kind == "dot"]
    dots += [(operation, entry)] if operation.kind == "dot" else []
    for inner in inside.values():  # of a fusion in a fusion
        dots += [
            (o, deep)
            for deep in [computations.get(called(inner), {})]
            for o in deep.values()
            if o.kind == "dot"
        ]
    total, dtype = 0.0, "f32"
    for dot, around in dots:
        dtype, left = shape(around[dot.operands[0]].type)
        axes = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", dot.line)
        assert axes is not None, dot.line
        length = math.prod(left[int(axis)] for axis in axes[1].split(","))
        total += 2.0 * math.prod(shape(dot.type)[1]) * length
    return total, dtype, "products" if dots else "others"


def called(operation: Operation) -> str:
    """Returns the name of the computation that a fusion is; of anything else an empty one."""
    found = re.search(r"calls=%([\w.\-]+)", operation.line)
    return found[1] if found else ""


def shape(text: str) -> tuple[str, list[int]]:
    """Returns dtype and sizes of the first array of a type."""
    found = re.match(r"\(?(\w+)\[([\d,]*)\]", text)
    assert found is not None, text
    return found[1], [int(size) for size in found[2].split(",") if size]


def size(text: str) -> float:
    """Returns the bytes of all arrays of a type."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", text)
    return sum(
        ITEMSIZE[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in arrays
        if dtype in ITEMSIZE
    )
