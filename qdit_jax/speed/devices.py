"""Devices by name: operations and bytes per second, as their makers state them, and memory."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax.errors import UserError

TERA, GIGA = 1e12, 1e9


@dataclasses.dataclass(frozen=True)
class Device:
    """What bounds a step from below.

    Attributes:
        name: what `--device` takes.
        title: in words.
        rates: operations per second (two per multiply-add) by the dtype of the operands, dense.
        bandwidth: bytes per second to and from its memory.
        memory: bytes of it.
        platform: JAX's word for it, which says whose kernels compute its products.
        fuses_attention: whether attention is computed without its weights in memory.
        wide: the precision of float32 products, in words.
        kinds: JAX's words for devices with these rates.
    """

    name: str
    title: str
    rates: Mapping[str, float]
    bandwidth: float
    memory: float
    platform: str
    fuses_attention: bool = True
    wide: str = "float32"
    kinds: tuple[str, ...] = ()


def tpu(
    name: str, tera: float, int8: float, bandwidth: float, memory: float, *kinds: str
) -> Device:
    """Returns a TPU; JAX multiplies float32 there in one pass of bfloat16 unless it is told not to."""
    rates = {"float32": tera * TERA, "bfloat16": tera * TERA, "int8": int8 * TERA}
    return Device(
        name,
        f"TPU {name}",
        rates,
        bandwidth * GIGA,
        memory * GIGA,
        "tpu",
        wide="one pass of bfloat16, JAX's default",
        kinds=kinds,
    )


DEVICES = {
    row.name: row
    for row in (
        Device(
            "h100",
            "NVIDIA H100 SXM",
            {
                **{"float32": 495 * TERA, "bfloat16": 989 * TERA},
                **{"int8": 1979 * TERA, "float8": 1979 * TERA},
            },
            3350 * GIGA,
            80 * GIGA,
            "cuda",
            wide="TF32, JAX's default",
            kinds=("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
        ),
        tpu("v5e", 197.0, 394.0, 819.0, 16.0, "TPU v5 lite", "TPU v5e"),
        tpu("v5p", 459.0, 918.0, 2765.0, 95.0, "TPU v5", "TPU v5p"),
        tpu("v6e", 918.0, 1836.0, 1640.0, 32.0, "TPU v6 lite", "TPU v6e"),
    )
}
HERE = "cpu"  # the name of the machine that asks, whose rates are measured
SIDE = 1024  # of the products that are timed for it


def devices_named(names: list[str]) -> list[Device]:
    """Returns devices by name; the machine itself is measured, in a second or two.

    Raises:
        UserError: if a name is not known.
    """
    if unknown := [name for name in names if name not in (*DEVICES, HERE)]:
        raise UserError(
            f"device={unknown[0]!r} is not known; use {', '.join(DEVICES)}, or {HERE} for this machine."
        )
    return [this_cpu() if name == HERE else DEVICES[name] for name in names]


def present_device() -> Device | None:
    """Returns the row that has the rates of JAX's first device; None where none has, as of a CPU."""
    kind = jax.devices()[0].device_kind
    return next((row for row in DEVICES.values() if kind in row.kinds), None)


def this_cpu() -> Device:
    """Returns this machine's processor, its rates those of one product of each kind, measured now."""
    rates = {}
    for dtype, sums in (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int32")):
        left = jnp.ones((SIDE, SIDE), dtype)

        @jax.jit
        def product(a: jax.Array, b: jax.Array, sums: str = sums) -> jax.Array:
            return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=sums)

        rates[dtype] = 2 * SIDE**3 / least_seconds(partial(product, left, left))
    values = jnp.ones(32 * SIDE**2, jnp.float32)
    negated = jax.jit(jnp.negative)
    copied = 2 * values.nbytes / least_seconds(lambda: negated(values))
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    title = f"this machine, {os.cpu_count()} CPU cores"
    return Device(HERE, title, rates, copied, memory, "cpu", fuses_attention=False)


def least_seconds(call: Callable[[], jax.Array], rounds: int = 5) -> float:
    """Returns the least of a few times of a call, which is what others on the machine disturb least."""
    call().block_until_ready()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call().block_until_ready()
        seconds.append(time.perf_counter() - began)
    return float(np.min(seconds))
