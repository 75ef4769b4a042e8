"""When, where and with which versions a report was made."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping

import jax

import qdit_jax


def provenance() -> dict[str, str]:
    """Returns the date (UTC), the versions, device and machine, as reports and their JSON carry them."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "qdit_jax": qdit_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {device.platform} ({device.device_kind}, "
        f"{platform.machine()})",
        "machine": f"{cores()}, {platform.system()} {platform.machine()}",
    }


def cores() -> str:
    """Returns how many cores the machine has, and how many of them this process may use."""
    total = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return f"{total} cores" if mine == total else f"{mine} of {total} cores"


def provenance_text(facts: Mapping[str, str]) -> str:
    """Returns date and versions in one line; the device stands beside the timings."""
    names = ("qdit_jax", "jax", "python")
    return f"{facts['date']}, " + ", ".join(f"{name} {facts[name]}" for name in names)
