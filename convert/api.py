"""The conversion: from a file or folder of PyTorch weights to a checkpoint of this library."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qdit_convert.dit import Choices
from qdit_convert.families import Layout, find_layout
from qdit_convert.folders import is_pipeline, read_config, read_pipeline
from qdit_convert.plan import Leaf, Params, Plan, build_params, check_plan, same
from qdit_convert.readers import open_weights
from qdit_convert.tensors import StateDict, about, bfloat16
from qdit_jax.errors import UserError

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint

DTYPES = ("float32", "bfloat16", "float16")
# Called with a network's name, the leaf just read, and the number of leaves in all.
Progress = Callable[[str, Leaf, int], None]


def convert(
    src: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    family: str | None = None,
    model: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    dtype: str | None = "float32",
    force: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Returns the checkpoint of the PyTorch weights in `src`, and writes it to `out` if given.

    The arguments are those of `read_model`. The output is written beside `out` and renamed, so that
    `out` never holds half a checkpoint.

    Args:
        force: replace the checkpoint at `out`; anything else there is kept.

    Raises:
        UserError: if the input is not as it should be, or `out` exists; nothing is written then.
    """
    import jax.numpy as jnp

    from qdit_jax.checkpoint import save
    from qdit_jax.files import as_path, check_free, local_copy

    if out is not None:
        kind = "export" if as_path(out).suffix == ".safetensors" else "checkpoint"
        check_free(out, force, kind, [src])
    with local_copy(src) as local:
        read = read_model(
            local,
            family=family,
            model=model,
            num_heads=num_heads,
            num_classes=num_classes,
            input_size=input_size,
            weights=weights,
            dtype=dtype,
            progress=progress,
            place=jnp.asarray,  # saving copies NumPy arrays, and device arrays not
        )
    checkpoint = to_checkpoint(read)
    if out is not None:
        save(out, checkpoint, overwrite=force)
    return checkpoint


class ReadModel(NamedTuple):
    """A network read from PyTorch weights: what a `Checkpoint` is made of."""

    family: str
    config: dict[str, Any]
    params: Params
    metadata: dict[str, Any]
    vae: Any = None  # a ReadModel, or None


class Network(NamedTuple):
    """One network of a source, opened and planned, its values not yet read."""

    label: str
    state: StateDict
    layout: Layout
    plan: Plan


def read_model(
    src: str | os.PathLike,
    *,
    family: str | None = None,
    model: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    weights: str | None = None,
    dtype: str | None = "float32",
    progress: Progress | None = None,
    place: Callable[[np.ndarray], Any] = same,
) -> ReadModel:
    """Returns the network in `src`, of a file, a sharded index, a folder, or a whole pipeline.

    Args:
        family: `"dit"`, `"sit"`, `"vae"` or `"inception"`; None tells it from the names. SiT has
            DiT's names, so that it must be asked for.
        model: a published size such as `"DiT-XL/2"`, to be checked against the file.
        num_heads: for sizes that are not published; shapes cannot tell it.
        num_classes: settles whether the label table ends with the null class.
        input_size: rows and columns of the latent, where the file does not say.
        weights: `"ema"` or `"model"`; None prefers `"ema"` where a file has both.
        dtype: of all leaves: one of `DTYPES`, or None to keep that of the file.
        progress: called after each leaf.
        place: what each leaf is replaced by as soon as it is read; by default it stays NumPy.

    Raises:
        UserError: with one sentence on what is wrong with the input.
    """
    choices = Choices(model, num_heads, num_classes, input_size)
    target = parse_dtype(dtype)
    networks, kept = open_source(Path(src), family, choices, weights)
    found = [_read_network(network, target, progress, place) for network in networks]
    main = found[0]._replace(metadata={**found[0].metadata, **kept})
    return main._replace(vae=found[1]) if len(found) > 1 else main


def open_source(
    src: Path, family: str | None, choices: Choices, weights: str | None
) -> tuple[list[Network], dict[str, Any]]:
    """Returns the networks in `src` (the VAE of a pipeline second), and what else to keep."""
    if not src.exists():
        raise UserError(f"{src} does not exist.")
    if (src / "model.json").is_file():
        raise UserError(f"{src} is a checkpoint of this library already.")
    if not is_pipeline(src):
        return [open_network(src, family, choices, weights)], {}
    transformer, vae, kept = read_pipeline(src)
    networks = [open_network(transformer, family, choices, weights)]
    if vae is not None:
        networks.append(open_network(vae, "vae", Choices(), weights))
    return networks, kept


def open_network(path: Path, family: str | None, choices: Choices, weights: str | None) -> Network:
    """Returns the network at `path`, its names and shapes checked."""
    state = open_weights(path, weights)
    config = read_config(path)
    with about(path):
        layout = find_layout(state, family)
        if layout.wants_config and config is None and path.is_dir():
            _check_config_needed(layout, choices)
        state = layout.rename(state)
        plan = layout.plan(state, choices, config)
        check_plan(plan, state)
    return Network(str(path), state, layout, plan)


def _check_config_needed(layout: Layout, choices: Choices) -> None:
    if "vae" in layout.families:
        raise UserError(
            "the folder has no config.json, which says what shapes cannot (the groups of a norm)."
        )
    if choices.num_heads is None or choices.input_size is None:
        raise UserError(
            "the folder has no config.json, which says what shapes cannot; pass --num-heads and "
            "--input-size in its place."
        )


def _read_network(
    network: Network,
    dtype: np.dtype | None,
    progress: Progress | None,
    place: Callable[[np.ndarray], Any],
) -> ReadModel:
    plan, total = network.plan, len(network.plan.leaves)

    def on_leaf(leaf: Leaf) -> None:
        if progress is not None:
            progress(plan.family, leaf, total)

    with about(network.label):
        try:
            params = build_params(plan, network.state.tensors, dtype, on_leaf, place)
        except OSError as error:
            raise UserError(f"{error.strerror or error}.") from None
    metadata = {
        "source": Path(network.label).name,
        "layout": network.layout.title,
        "weights": network.state.weights,
        "source_family": "sit" if plan.config.get("velocity") else plan.family,
    }
    return ReadModel(plan.family, plan.config, params, metadata)


def to_checkpoint(read: ReadModel) -> Checkpoint:
    """Returns the checkpoint of a network that was read, with its VAE."""
    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.models import build_model

    return Checkpoint(
        model=build_model(read.family, read.config),
        params=read.params,
        metadata=read.metadata,
        vae=None if read.vae is None else to_checkpoint(read.vae),
    )


def parse_dtype(dtype: str | None) -> np.dtype | None:
    """Returns the NumPy dtype of that name; None stays None."""
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}.")
    return bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
