"""The share of a device's peak that a timed step reaches."""

from __future__ import annotations

from qdit_jax.speed.contenders import Contender, Way
from qdit_jax.speed.devices import Device
from qdit_jax.speed.predicted import Counted


def peak_share(
    counted: Counted, contender: Contender, way: Way, inputs: int, device: Device, ms: float
) -> float | None:
    """Returns the time of a step's products at full rates, each in the dtype of its operands, over `ms`.

    None where quantized layers are multiplied in float32, as simulated numerics do: the table has the
    rate of float32 in JAX's default precision, which these do not take.
    """
    layers = contender.layers
    if way.numerics == "simulated" and any(layer.act is not None for layer in layers):
        return None
    used = [*contender.implementations(way, inputs)]
    step = counted.step(contender, inputs, used[0] if len(used) == 1 else None)
    parts = list(step.work(device))
    if layers and any(part.kind == "float32" for part in parts):
        return None
    return 1000 * sum(part.operations / device.rates[part.kind] for part in parts) / ms
