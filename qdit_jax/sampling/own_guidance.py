"""The guidance of a network: what it was published with, each expert's own, and what records say of it."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from flax import linen as nn

from qdit_jax import diffusion
from qdit_jax.models import embeds_guidance, experts_of
from qdit_jax.types import Scalar

DEFAULT_GUIDANCE = 1.5  # of a network that does not say its own
PUBLISHED = "published"  # as the network was published: its scale, as many channels
Given = TypeVar("Given")  # a number, an array, a scale over time, None or `PUBLISHED`
# A number, one per sample, a function of the timesteps [B], or `PUBLISHED`.
Guidance: TypeAlias = Scalar | diffusion.SteppedScale | str


def takes_embedded_guidance(model: nn.Module) -> bool:
    """Returns whether a network, or a function's stand-in, takes guidance in its condition."""
    return hasattr(model, "example_condition") and embeds_guidance(model)  # type: ignore[arg-type]


def own_guidance(model: Any) -> float | diffusion.SteppedScale | None:
    """Returns the guidance that a network was published with; None for one that takes none."""
    if not getattr(model, "has_null", True) and not takes_embedded_guidance(model):
        return None
    found = getattr(model, "default_guidance", DEFAULT_GUIDANCE)
    return by_expert(model, found) if isinstance(found, tuple) else found


def by_expert(model: Any, scales: tuple[float, ...]) -> diffusion.SteppedScale:
    """Returns a scale for each of two experts: from the boundary on, and below it.

    Raises:
        ValueError: if the network has not so many experts.
    """
    count = len(experts_of(model))
    if len(scales) != 2 or count != 2:
        text = ",".join(f"{scale:g}" for scale in scales)
        has = f"{count} experts" if count else "one network for all timesteps"
        raise ValueError(
            f"guidance={text} gives {len(scales)} scales, one per expert, and this model has {has}; "
            f"give {'two' if count == 2 else 'one number'}."
        )
    return diffusion.SteppedScale(float(model.boundary), float(scales[0]), float(scales[1]))


def chosen_guidance(model: Any, guidance: Given) -> Any:
    """Returns the guidance as it is, or the network's own for `PUBLISHED`."""
    return own_guidance(model) if is_published(guidance) else guidance


def is_published(guidance: object) -> bool:
    """Returns whether guidance is left to the network."""
    return isinstance(guidance, str) and guidance == PUBLISHED


def guidance_record(guidance: Any) -> Any:
    """Returns guidance as records keep it: a number, numbers, None, or words."""
    if isinstance(guidance, diffusion.SteppedScale):
        above, below, at = (
            float(np.asarray(value))
            for value in (guidance.at_or_above, guidance.below, guidance.boundary)
        )
        return f"{above:g} from timestep {at:g}, {below:g} below"
    if guidance is None or isinstance(guidance, int | float | str):
        return guidance
    if callable(guidance):
        return type(guidance).__name__
    return np.asarray(jax.device_get(guidance), np.float64).tolist()


def guidance_text(record: Any) -> str:
    """Returns what `guidance_record` returned, or a number, in words."""
    record = guidance_record(record)
    if isinstance(record, int | float):
        return f"{record:g}"
    return "none" if record is None else str(record)
