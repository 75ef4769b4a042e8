"""When, where and with which versions a report was made."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping

import jax

import qdit_jax


def provenance() -> dict[str, str]:
    """Returns the date (UTC), the versions and the device, as reports and their JSON carry them."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "qdit_jax": qdit_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {device.platform} ({device.device_kind}, "
        f"{platform.machine()})",
    }


def provenance_text(facts: Mapping[str, str]) -> str:
    """Returns date and versions in one line; the device stands beside the timings."""
    names = ("qdit_jax", "jax", "python")
    return f"{facts['date']}, " + ", ".join(f"{name} {facts[name]}" for name in names)
