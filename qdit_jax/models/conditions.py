"""Prepared conditions as dicts: the entries of samples, and `null_*` entries for guidance.

A dict may carry, beside an entry such as `text`, what guidance is to use in its place: `null_text`, for
every sample or one row for all. It travels with the condition and is taken off before the network is
called.

Dimensions: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from qdit_jax.types import Condition, Params

if TYPE_CHECKING:
    from qdit_jax.models.family import Network

NULL = "null_"  # begins the name of a null entry
GUIDANCE = "guidance"
OF_PROMPT = ("text", "text_mask", "pooled")  # what an encoder makes of a prompt, null together
# Every name that a condition's entry may have, with what it holds.
ENTRIES = {
    "text": "embeddings of the prompt, [N, L, C]",
    "text_mask": "True where text holds a token, [N, L]",
    "pooled": "one embedding of the prompt, [N, P]",
    "guidance": "embedded guidance, [N]",
    "size": "rows and columns in pixels, [N, 2]",
    "aspect_ratio": "rows by columns, [N, 1]",
    "fps": "frames per second, [N]",
    "height": "rows in pixels, [N]",
    "width": "columns in pixels, [N]",
    "frame_mask": "True where a frame is denoised, [N, T]",
    "position_ids": "positions of tokens, [N, tokens, 3 or 4]",
    "text_ids": "positions of text tokens, [N, L, 3 or 4]",
}


def without_null(condition: Condition) -> Condition:
    """Returns the condition that a network is called with: without `null_*` entries."""
    if not isinstance(condition, Mapping):
        return condition
    return {name: entry for name, entry in condition.items() if not name.startswith(NULL)}


def null_entries(condition: Condition) -> dict[str, Any]:
    """Returns the `null_*` entries of a condition under the names that they stand for."""
    if not isinstance(condition, Mapping):
        return {}
    return {n.removeprefix(NULL): entry for n, entry in condition.items() if n.startswith(NULL)}


def embeds_guidance(model: Network) -> bool:
    """Returns whether a network takes the scale of guidance as an entry of its condition.

    Guidance is then distilled into it and needs no second call (FLUX.1-dev).
    """
    example = model.example_condition(1)
    return isinstance(example, Mapping) and GUIDANCE in example


def with_guidance(model: Network, condition: Condition, guidance: Any) -> Condition:
    """Returns a condition with `guidance` of every sample, where the network embeds it.

    A condition that has the entry is returned as it is, and so is any with `guidance=None`. A network
    that embeds other numbers than the scale says by what it is multiplied, as `guidance_unit`.
    """
    if guidance is None or not isinstance(condition, Mapping) or GUIDANCE in condition:
        return condition
    if not embeds_guidance(model):
        return condition
    counts = [entry.shape[0] for name, entry in condition.items() if not name.startswith(NULL)]
    scale = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), (counts[0],))
    return {**condition, GUIDANCE: getattr(model, "guidance_unit", 1.0) * scale}


def null_condition_of(model: Network, params: Params, condition: Condition) -> Condition:
    """Returns the null condition of every sample, shaped like `without_null(condition)`.

    Its entries are the `null_*` ones where the condition has any, with the samples' own for what is no
    prompt (such as a size); else they are what the network says, see `Network.null_condition`.

    Raises:
        ValueError: if only some of a prompt's entries have a null entry, or there is no null.
    """
    given, null = without_null(condition), null_entries(condition)
    if not null:
        found = model.null_condition(given, params)
        if found is None:
            raise ValueError(
                "this network has no null condition of its own, which guidance needs; give null_text "
                "(and null_text_mask, null_pooled where it takes those), or use guidance=None."
            )
        return found
    check_null_names(given, null)
    return {
        name: jnp.broadcast_to(jnp.asarray(null[name], entry.dtype), entry.shape)
        if name in null
        else entry
        for name, entry in given.items()  # type: ignore[union-attr]
    }


def check_null_names(given: Condition, null: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless null entries replace entries, and all of a prompt's together."""
    names = list(given) if isinstance(given, Mapping) else []
    if strange := sorted(set(null) - set(names)):
        raise ValueError(
            f"{NULL}{strange[0]} is the null of {strange[0]}, which the condition lacks; leave it out."
        )
    missing = [name for name in OF_PROMPT if name in names and name not in null]
    if missing:
        raise ValueError(
            f"{NULL}{missing[0]} is missing beside {NULL}{sorted(null)[0]}: the null of a prompt "
            f"replaces {', '.join(n for n in OF_PROMPT if n in names)} together; give all of them."
        )
