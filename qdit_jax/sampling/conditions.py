"""Conditions of many samples: checked once, and taken row by row; the shape of a sample.

Dimensions: N conditions, B batch, L rows of text, H, W, C one latent, T frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qdit_jax import diffusion
from qdit_jax.errors import check_counts
from qdit_jax.kernels import attentions_used
from qdit_jax.models import (
    ENTRIES,
    NULL,
    OF_PROMPT,
    Network,
    abstract_rows,
    as_condition,
    attention_shapes,
    check_null_names,
    example_inputs,
    is_concrete,
    null_entries,
    rows_per_sample,
    with_guidance,
    without_null,
)
from qdit_jax.types import AnyArray, Condition, Params

Shape = tuple[int, ...]


def checked_conditions(model: Network, condition: Condition) -> Condition:
    """Returns conditions as arrays, whole numbers as int32, after the network's own check.

    Raises:
        ValueError: if the network does not know one, entries differ in number, or a null entry does
            not fit its entry.
    """
    condition = as_condition(condition)
    check_lengths(condition)
    check_null(model, condition)
    # Embedded guidance may come later, as guidance=.
    model.check_condition(without_null(with_guidance(model, condition, 1.0)))
    return condition


def num_conditions(condition: Condition) -> int | None:
    """Returns how many conditions there are; None of a network that takes none."""
    leaves = jax.tree.leaves(without_null(condition))
    return leaves[0].shape[0] if leaves else None


def check_lengths(condition: Condition) -> None:
    """Raises `ValueError` unless all entries hold as many conditions; null ones may hold one."""
    if not isinstance(condition, Mapping) or not condition:
        return
    counts = {name: np.shape(entry)[:1] for name, entry in condition.items()}
    if empty := [name for name, count in counts.items() if count in ((), (0,))]:
        raise ValueError(
            f"{empty[0]} has shape {np.shape(condition[empty[0]])}; give one row per condition."
        )
    samples = {name: count for name, count in counts.items() if not name.startswith(NULL)}
    first = next(iter(samples), None)
    for name, count in counts.items():
        if first is None or count == samples[first] or (name.startswith(NULL) and count == (1,)):
            continue
        also = ", or one for all" if name.startswith(NULL) else ""
        raise ValueError(
            f"{name} has {count[0]} rows and {first} has {samples[first][0]}; give one per "
            f"condition{also}."
        )


def check_null(model: Network, condition: Condition) -> None:
    """Raises `ValueError` if null entries do not fit their entries, or the network has no null."""
    null = null_entries(condition)
    if not null:
        return
    if not model.has_null:
        raise ValueError(
            f"{NULL}{min(null)} has no effect: this network takes no guidance by a null condition; "
            "leave it out."
        )
    given: Any = without_null(condition)
    check_null_names(given, null)
    for name, entry in null.items():
        if np.shape(entry)[1:] != np.shape(given[name])[1:]:
            raise ValueError(
                f"{NULL}{name} has rows of shape {np.shape(entry)[1:]} and {name} of "
                f"{np.shape(given[name])[1:]}; prepare both alike, padded to the same length."
            )


def rows_of(condition: Condition, index: Int[AnyArray, " B"]) -> Condition:
    """Returns the conditions of the samples `index`, cyclically; floating-point ones as float32.

    Embeddings may thus be held in 16 bits.
    """
    index = np.asarray(index)

    def row(leaf: AnyArray) -> AnyArray:
        taken = leaf[index % leaf.shape[0]]
        is_float = jnp.issubdtype(taken.dtype, jnp.floating)
        return taken.astype(np.float32) if is_float else taken

    return jax.tree.map(row, condition)


def cyclic_conditions(
    model: Network, conditions: Condition, index: Int[AnyArray, " B"]
) -> Condition:
    """Returns the conditions of the samples `index`, assigned cyclically: entry `i % num_entries`.

    `conditions` is a pytree with one entry per class or prompt, as numbers or NumPy arrays; None is
    every condition that the network knows. Embeddings come back in float32.

    Raises:
        ValueError: if it is None and the network's conditions cannot be listed, or a value of it
            is out of range.
    """
    if conditions is None:
        conditions = model.all_conditions()
        if conditions is None:
            example = model.example_condition(1)
            if not jax.tree.leaves(example):
                return example
            raise ValueError(
                "conditions=None: this model takes prompts, which cannot be listed; give the "
                "embeddings of some."
            )
    else:
        conditions = checked_conditions(model, conditions)
    return rows_of(conditions, index)


def check_entries(model: Network, condition: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns entries of a file as the network takes them: masks as bool, others with their dtype.

    `source` begins the sentences. Floating-point entries keep their width in bits, see `rows_of`.

    Raises:
        ValueError: for a network that takes no dict, and for the first entry whose name, dtype,
            shape or value does not fit, or which is missing.
    """
    example = model.example_condition(1)
    if not isinstance(example, Mapping):
        takes = "no condition" if example is None else "class labels"
        raise ValueError(f"{source}: this network takes {takes}, not embeddings; leave it out.")
    found = {}
    for name, entry in condition.items():
        plain = name.removeprefix(NULL)
        if plain not in example and plain not in ENTRIES:
            raise ValueError(
                f"{source}: the entry {name!r} is not known; this network takes "
                f"{', '.join(example)}, and {NULL}* of them."
            )
        kept = np.asarray(entry)
        found[name] = fitting_entry(name, kept, example.get(plain), source)
    for name in OF_PROMPT:
        if name in example and name not in found:
            raise ValueError(
                f"{source}: the entry {name!r} is missing ({ENTRIES[name]}); this network takes "
                f"{', '.join(example)}."
            )
    try:
        checked_conditions(model, found)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    check_mask(found, source)
    return found


def fitting_entry(
    name: str, entry: np.ndarray, example: jax.ShapeDtypeStruct | None, source: str
) -> np.ndarray:
    """Returns one entry, a mask as bool; raises `ValueError` if it does not fit the example."""
    is_float = jnp.issubdtype(entry.dtype, jnp.floating)
    if not is_float and entry.dtype.kind not in "biu":
        raise ValueError(f"{source}: {name} has dtype {entry.dtype}; give numbers.")
    if is_float and not np.isfinite(entry.astype(np.float32)).all():
        raise ValueError(
            f"{source}: {name} holds NaN or infinity; embed the prompts in float32 or bfloat16."
        )
    if example is None:
        return entry
    if entry.ndim != len(example.shape):
        raise ValueError(
            f"{source}: {name} has shape {entry.shape}; give "
            f"{ENTRIES.get(name.removeprefix(NULL), f'{len(example.shape)} axes')}."
        )
    if entry.ndim > 1 and example.dtype != bool and entry.shape[-1] != example.shape[-1]:
        raise ValueError(
            f"{source}: {name} is {entry.shape[-1]} wide and the network takes {example.shape[-1]}; "
            "use the text encoder that the network was trained with."
        )
    if example.dtype == bool:
        if not np.isin(entry, (0, 1)).all():
            raise ValueError(f"{source}: {name} holds other values than 0 and 1; give a mask.")
        return entry.astype(bool)
    if not is_float and name.removeprefix(NULL) in ("text", "pooled"):
        raise ValueError(
            f"{source}: {name} has dtype {entry.dtype}, as token numbers have; give embeddings, such "
            "as `qdit embed-text` writes."
        )
    return entry


def check_mask(condition: Mapping[str, Any], source: str) -> None:
    """Raises `ValueError` if a mask is not of its text, or keeps no token of a row."""
    for prefix in ("", NULL):
        text, mask = (condition.get(prefix + name) for name in ("text", "text_mask"))
        if mask is None:
            continue
        if text is not None and mask.shape[1:] != text.shape[1:2]:
            raise ValueError(
                f"{source}: {prefix}text_mask has {mask.shape[1]} tokens and {prefix}text has "
                f"{text.shape[1]}; give one value per token."
            )
        if not mask.any(axis=1).all():
            row = int(np.flatnonzero(~mask.any(axis=1))[0])
            raise ValueError(
                f"{source}: {prefix}text_mask keeps no token of row {row}; keep at least one (an "
                "empty prompt still has its end token)."
            )


def shape_of_sample(model: Network, shape: Sequence[int] | None) -> Shape:
    """Returns the shape of one sample, the network's own if `shape` is None.

    Raises:
        ValueError: if it has other axes or channels than the network's own.
    """
    own = tuple(model.sample_shape())
    if shape is None:
        return own
    check_counts(**{f"shape[{i}]": size for i, size in enumerate(shape)})
    found = tuple(int(size) for size in shape)
    if len(found) != len(own) or found[-1] != own[-1]:
        axes = "frames, rows, columns, channels" if len(own) == 4 else "rows, columns, channels"
        raise ValueError(
            f"shape={found} does not fit the network, whose samples have {axes}: {own} by default."
        )
    return found


def check_call(denoise_fn: Callable[..., Any], shape: Shape, condition: Condition) -> None:
    """Raises `ValueError` if a network, guided or not, cannot take such a sample and condition.

    It is traced, which compiles and computes nothing; the network says why in its own words.

    Args:
        denoise_fn: a pytree, such as a `Denoiser`.
        condition: with the batch first; a traced one is not checked.
    """
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(condition)):
        return
    given = jax.tree.map(partial(abstract_rows, 2), condition)
    x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    timestep = jax.ShapeDtypeStruct((2,), jnp.float32)
    try:
        out = jax.eval_shape(lambda fn, *inputs: fn(*inputs), denoise_fn, x, timestep, given)
    except KeyError as error:
        raise ValueError(f"the condition lacks {error}, which the network takes.") from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        beside = f" with {shapes_text(given)}" if isinstance(given, Mapping) else ""
        raise ValueError(
            f"the network cannot take samples of shape {shape}{beside}: {reason}"
        ) from error
    if out.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"shape={shape} is not supported: the network returns {out.shape[1:]}; use a size that its "
            "patches divide."
        )


def check_takes(
    denoise_fn: Callable[..., Any],
    model: Network,
    shape: Sequence[int] | None,
    conditions: Condition,
) -> None:
    """Checks by `check_call` what is not certain: another shape than the network's own, or a dict.

    Raises:
        ValueError: as `shape_of_sample`, `checked_conditions` and `check_call`.
    """
    size = shape_of_sample(model, shape)
    if isinstance(conditions, Mapping):
        conditions = checked_conditions(model, conditions)
        diffusion.check_condition(denoise_fn, conditions)
        check_call(denoise_fn, size, conditions)
    elif size != tuple(model.sample_shape()):
        check_call(denoise_fn, size, cyclic_conditions(model, conditions, np.arange(1)))


def sample_rows(
    model: Network, shape: Sequence[int] | None, conditions: Condition
) -> dict[str, int]:
    """Returns `rows_per_sample` for samples of a shape, and embeddings of that length."""
    return rows_per_sample(model, sample_inputs(model, shape, conditions))


def sample_attention(
    model: Network,
    params: Params,
    shape: Sequence[int] | None = None,
    conditions: Condition = None,
) -> dict[str, int]:
    """Returns how many attentions of a network each implementation computes, by name, for such samples."""
    return attentions_used(attention_shapes(model, params, sample_inputs(model, shape, conditions)))


def sample_inputs(
    model: Network, shape: Sequence[int] | None, conditions: Condition
) -> tuple[Any, ...] | None:
    """Returns abstract arguments of a call with one such sample; None where they are the network's own."""
    given = without_null(conditions) if isinstance(conditions, Mapping) else None
    if shape is None and given is None:
        return None
    given = None if given is None else checked_conditions(model, given)
    given = with_guidance(model, given, 1.0)
    size = shape_of_sample(model, shape)
    return example_inputs(model, 1, size, given)


def shapes_text(condition: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {list(entry.shape[1:])}" for name, entry in condition.items())
