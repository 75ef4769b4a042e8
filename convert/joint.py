"""What the layouts of networks with joint attention share (Stable Diffusion 3, FLUX.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from qdit_convert.plan import Leaf, Shape, linear, most_common
from qdit_convert.settings import network_settings
from qdit_convert.tensors import StoredTensor, shape_text
from qdit_jax.diffusion import Table
from qdit_jax.errors import UserError

# From a layer's path to the names of its tensors in a file, without `.weight` and `.bias`; several
# are joined along their first axis.
Naming = Callable[[str], tuple[str, ...]]
TEXT_NOTE = "examples and costs count {} rows of text, as published; texts of any length are taken"
SAMPLE_SIZE = 128  # rows and columns of the published models' latents: 1024 pixels


def swapped(array: np.ndarray) -> np.ndarray:
    """Returns the two halves of the first axis, the second first.

    diffusers' `AdaLayerNormContinuous` has scale, then shift; the authors have shift, then scale.
    """
    return np.concatenate(np.split(array, 2)[::-1])


def swapped_linear(array: np.ndarray) -> np.ndarray:
    """Returns the kernel of a linear layer whose halves of outputs are swapped."""
    return linear(swapped(array))


def no_bias(path: str, rows: int) -> Leaf:
    """Returns the bias of a layer that has none in its file: zeros."""
    return Leaf(f"{path}/bias", (), (), values=partial(np.zeros, rows, np.float32))


def layer(
    path: str,
    keys: Sequence[str],
    shape: Shape,
    parts: Sequence[int] = (),
    swap: bool = False,
    bias: bool = True,
) -> list[Leaf]:
    """Returns the leaves of a linear layer.

    Args:
        keys: of its tensors, joined along their first axis.
        shape: of the whole weight, `[out, in]`.
        parts: the rows of each tensor where they differ; else they are equal.
        swap: whether the file has the two halves of the rows in the other order.
        bias: whether the file has one.
    """
    rows = parts if len(parts) == len(keys) else [shape[0] // len(keys)] * len(keys)
    weights, biases = (tuple(f"{key}.{name}" for key in keys) for name in ("weight", "bias"))
    each = tuple((n, *shape[1:]) for n in rows)
    kernel = Leaf(f"{path}/kernel", weights, (), swapped_linear if swap else linear, each=each)
    if not bias:
        return [kernel, no_bias(path, shape[0])]
    return [
        kernel,
        Leaf(
            f"{path}/bias",
            biases,
            (),
            *([swapped] if swap else []),
            each=tuple(shape[:1] for shape in each),
        ),
    ]


def num_heads(
    width: int, stated: int | None, head_dim: int | None, published: int, notes: list[str]
) -> int:
    """Returns the number of heads; `notes` say what is assumed.

    Args:
        stated: by the user, or by config.json.
        head_dim: channels of a head, where the file has norms of queries.
        published: channels of a head in every published size.
    """
    if head_dim is not None:
        if width % head_dim or stated not in (None, width // head_dim):
            raise UserError(
                f"num_heads={stated or '?'} does not fit the width {width} and the norms of queries, "
                f"which have {head_dim} channels a head."
            )
        return width // head_dim
    if stated is not None:
        if width % stated:
            raise UserError(f"the width {width} must be divisible by num_heads={stated}.")
        return stated
    if width % published:
        raise UserError(
            f"the width {width} is not a multiple of {published}, the channels of a head in every "
            "published size, and shapes cannot tell the number of attention heads; pass --num-heads."
        )
    heads = width // published
    notes.append(f"num_heads taken to be {heads}: heads of {published} channels, as published")
    return heads


def sample_size(
    chosen: int | tuple[int, ...] | None, stated: object, limit: int, unit: int, notes: list[str]
) -> int | tuple[int, int]:
    """Returns the rows and columns of latents that are sampled by default; `notes` say an assumption.

    Args:
        chosen: by the user.
        stated: by config.json.
        limit: the most that the network takes.
        unit: which must divide them.
    """
    size: Any = chosen if chosen is not None else stated
    if size is None:
        size = min(SAMPLE_SIZE, limit)
        notes.append(f"sample_size taken to be {size}: the network takes others (--input-size)")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or any(n < 1 or n % unit or n > limit for n in sides):
        raise UserError(
            f"input_size={shape_text(sides)} must be rows, or rows and columns, of latents, multiples "
            f"of {unit} up to {limit}."
        )
    return sides[0] if sides[0] == sides[1] else sides


def rope_axes(
    channels: int, published: tuple[int, ...], said: Sequence[int] | None, notes: list[str]
) -> tuple[int, ...]:
    """Returns how many channels of a head turn with each coordinate of a position.

    Args:
        channels: of a head.
        published: those of every published size.
        said: by the user, or by config.json.

    Raises:
        UserError: if nothing says them, or they do not make a head.
    """
    if said is None and channels != sum(published):
        raise UserError(
            f"heads of {channels} channels are not those of a published size, and shapes cannot tell "
            "which of them turn with each coordinate; pass --rope-axes, as "
            f"{' '.join(map(str, published))} in the published ones."
        )
    if said is None:
        said = published
        notes.append(f"rope_axes taken to be {published}, as published")
    axes = tuple(said)
    if len(axes) != len(published) or any(type(n) is not int or n < 1 or n % 2 for n in axes):
        count = {3: "three", 4: "four"}[len(published)]
        raise UserError(f"rope_axes={list(axes)} must be {count} even numbers of channels.")
    if sum(axes) != channels:
        raise UserError(
            f"rope_axes={list(axes)} make {sum(axes)} channels, but a head has {channels}."
        )
    return axes


def checked_config(
    config: Mapping[str, Any] | None, class_name: str, table: Table, found: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the settings of a config.json that fits the weights; empty if there is none.

    Args:
        found: of some settings, what the weights have.

    Raises:
        UserError: if it is of another class, is not understood, or contradicts the weights.
    """
    if config is None:
        return {}
    settings = network_settings(config, table, [class_name])
    heads, head_dim = settings["num_attention_heads"], settings["attention_head_dim"]
    said = settings | {
        "num_attention_heads * attention_head_dim": heads and head_dim and heads * head_dim
    }
    for key, has in found.items():
        says = list(said[key]) if isinstance(said[key], tuple) else said[key]
        if says is not None and says != has:
            raise UserError(f"config.json says {key} = {says}, but the weights have {has}.")
    return settings


def head_dim(tensors: Mapping[str, StoredTensor], norms: re.Pattern[str]) -> int | None:
    """Returns the channels of a head, of most norms of queries and keys; None if there are none."""
    found = [t.shape[0] for key, t in tensors.items() if norms.search(key) and len(t.shape) == 1]
    return most_common(found) if found else None
