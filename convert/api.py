"""The conversion: from a file or folder of PyTorch weights to a checkpoint of this library."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from qdit_convert.choices import Choices, Told
from qdit_convert.experts import (
    AUTHORS_BOUNDARY,
    AUTHORS_FOLDERS,
    as_experts,
    is_pair,
    one_of_a_pair,
)
from qdit_convert.families import check_options, find_layout
from qdit_convert.folders import is_pipeline, read_config
from qdit_convert.hub import source
from qdit_convert.layout import Layout
from qdit_convert.names import select_network
from qdit_convert.opened import Network
from qdit_convert.pipelines import Parts, read_pipeline
from qdit_convert.plan import check_plan, same
from qdit_convert.quantized import check_places, quantized_notes
from qdit_convert.readers import open_weights
from qdit_convert.reading import (
    ReadModel,
    at_once,
    in_own_names,
    read_network,
    suggesting_raw,
    to_checkpoint,
    when_used,
)
from qdit_convert.tensors import about, bfloat16
from qdit_jax.diffusion import check_fit, read_scheduler
from qdit_jax.errors import UserError
from qdit_jax.files import is_hub_id
from qdit_jax.types import ProgressFn, untold

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint

AUTOENCODERS = ("vae", "wan-vae")
DTYPES = ("float32", "bfloat16", "float16")


def convert(
    src: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    family: str | None = None,
    weights: str | None = None,
    dtype: str | None = "float32",
    force: bool = False,
    progress_fn: ProgressFn = untold,
    **told: Unpack[Told],
) -> Checkpoint:
    """Returns the checkpoint of the PyTorch weights in `src`, and writes it to `out` if given.

    The arguments are those of `read_model`. The output is written beside `out` and renamed, so that
    `out` never holds half a checkpoint.

    Args:
        force: replace the checkpoint at `out`; anything else there is kept.

    Raises:
        UserError: if the input cannot be converted, or `out` exists; nothing is written then.
    """
    import jax.numpy as jnp

    from qdit_jax.checkpoint import load

    given: Any = {
        "family": family,
        "weights": weights,
        "dtype": dtype,
        "progress_fn": progress_fn,
        **told,
    }
    if out is None:
        return to_checkpoint(read_model(src, place=jnp.asarray, **given))
    convert_checkpoint(src, out, force=force, **given)
    return load(out)


def convert_checkpoint(
    src: str | os.PathLike,
    out: str | os.PathLike,
    *,
    family: str | None = None,
    weights: str | None = None,
    dtype: str | None = "float32",
    force: bool = False,
    progress_fn: ProgressFn = untold,
    **told: Unpack[Told],
) -> Checkpoint:
    """Writes the checkpoint of the PyTorch weights in `src` to `out`, one array at a time.

    Beside the runtime, memory holds a few copies of the largest array (all of them, if `out` is one
    file). The arguments are those of `convert`, and so is what is written.

    Returns:
        The new checkpoint as `open_checkpoint` reads it.

    Raises:
        UserError: as `convert`.
    """
    from qdit_jax.checkpoint import open_checkpoint, save
    from qdit_jax.files import as_path, check_free

    kind = "export" if as_path(out).suffix == ".safetensors" else "checkpoint"
    check_free(out, force, kind, [] if is_hub_id(src) else [src])
    target = parse_dtype(dtype)
    with opened(src, family, Choices(**told), weights) as (networks, kept):
        read = [read_network(network, when_used(target), progress_fn) for network in networks]
        save(out, to_checkpoint(whole_of(read, kept)), overwrite=force)
    return open_checkpoint(out)


def read_model(
    src: str | os.PathLike,
    *,
    family: str | None = None,
    weights: str | None = None,
    dtype: str | None = "float32",
    progress_fn: ProgressFn = untold,
    place: Callable[[np.ndarray], Any] = same,
    **told: Unpack[Told],
) -> ReadModel:
    """Returns the network in `src`, of a file, a sharded index, a folder, or a whole pipeline.

    Args:
        src: a path, a URL, or an id of the Hugging Face hub, `hf:OWNER/NAME[@REVISION][/PATH]`.
        family: such as `"dit"`, `"pixart"` or `"vae"`; None recognizes it by the names of the tensors.
            Those of SiT are DiT's, so that `"sit"` must be given.
        weights: `"ema"` or `"model"`; None prefers `"ema"` where a file has both.
        dtype: of all leaves: one of `DTYPES`, or None to keep that of the file.
        progress_fn: told of each leaf read, of the network that is read as `stage`, and its `total`.
        place: called with each leaf as soon as it is read, returns its replacement; NumPy by default.
        told: what the file does not say of the network: the fields of `Choices`, as `num_heads=16`.

    Raises:
        UserError: with one sentence on what is wrong with the input.
    """
    params_fn = at_once(parse_dtype(dtype), place)
    with opened(src, family, Choices(**told), weights) as (networks, kept):
        return whole_of([read_network(n, params_fn, progress_fn) for n in networks], kept)


@contextmanager
def opened(
    src: str | os.PathLike, family: str | None, choices: Choices, weights: str | None
) -> Iterator[tuple[list[Network], dict[str, Any]]]:
    """Yields the networks in `src` (see `open_source`), whose files are there for so long."""
    with source(src) as (local, commit):
        networks, kept = open_source(local, family, choices, weights)
        yield networks, kept if commit is None else {**kept, "hub": commit}


def whole_of(found: list[ReadModel], kept: dict[str, Any]) -> ReadModel:
    """Returns the first network with the second as its autoencoder, and what else to keep."""
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
    if not is_pipeline(src) and is_pair(src):
        return [_open_pair(src, family, choices, weights)], {}
    if not is_pipeline(src):
        network = open_network(src, family, choices, weights)
        _check_used(choices, [network])
        folder = src if src.is_dir() else src.parent
        if network.plan.family not in AUTOENCODERS and is_pipeline(folder.absolute().parent):
            note = "give the folder of the whole pipeline to use its scheduler"
            network = network.noted(f"this is one part of a pipeline: {note}")
        elif one_of_a_pair(folder):
            network = network.noted("this is one of two experts: give the folder that holds both")
        return [network], {}
    parts = read_pipeline(src)
    factors = Choices(scaling_factor=choices.scaling_factor, shift_factor=choices.shift_factor)
    own = replace(choices, scaling_factor=None, shift_factor=None)
    found = [open_network(folder, family, own, weights) for folder in parts.transformers]
    network = found[0]
    if parts.boundary is not None:
        with about(src):
            network = as_experts(str(src), found, parts.boundary)
    networks = [_of_pipeline(network, parts)]
    if parts.vae is not None:
        networks.append(open_network(parts.vae, parts.row.vae_family, factors, weights))
    _check_used(choices, networks)
    return networks, parts.kept


def _open_pair(src: Path, family: str | None, choices: Choices, weights: str | None) -> Network:
    """Returns the authors' two networks in the folder `src` as one."""
    found = [open_network(src / name, family, choices, weights) for name in AUTHORS_FOLDERS]
    with about(src):
        network = as_experts(str(src), found, AUTHORS_BOUNDARY)
    return network.noted(
        f"{AUTHORS_FOLDERS[0]} is run from timestep {AUTHORS_BOUNDARY:g} on, as the authors' "
        "text-to-video network: no file says it"
    )


def _check_used(choices: Choices, networks: list[Network]) -> None:
    """Raises `UserError` for an option of another kind of network than the one found."""
    is_vae = any(network.plan.family == "vae" for network in networks)
    for name in ("scaling_factor", "shift_factor"):
        if getattr(choices, name) is not None and not is_vae:
            raise UserError(
                f"{name}={getattr(choices, name)} is of an autoencoder, and there is none here; "
                f"leave out --{name.replace('_', '-')}."
            )
    main = networks[0]
    if choices.noise_time is not None and "sit" not in main.layout.families[:1]:
        raise UserError(
            f"noise_time={choices.noise_time} is of a SiT, which this is not; leave out --noise-time, "
            "or pass --family sit."
        )


def _of_pipeline(network: Network, parts: Parts) -> Network:
    """Returns the network of a pipeline, set to what its class and its scheduler say.

    Raises:
        UserError: if the network does not return what the scheduler reads.
    """
    config = {**network.plan.config, **parts.row.fields}
    network = network._replace(plan=replace(network.plan, config=config))
    if parts.left_out:
        names = " and ".join(parts.left_out)
        network = network.noted(f"{names} left out: prompts are given as embeddings")
    for note in parts.notes:
        network = network.noted(note)
    if "scheduler" not in parts.kept:
        note = f"the pipeline has no scheduler: sampled as the published {parts.row.process}"
        return network.noted(note)
    return _on_process(network, parts.kept["scheduler"])


def _on_process(network: Network, settings: dict[str, Any]) -> Network:
    """Returns a network with what its scheduler reads: a DiT's velocity, for a flow."""
    from qdit_jax.models import build_model

    scheduler = read_scheduler(settings)
    config = network.plan.config
    if scheduler.is_flow and "velocity" in config:
        # Time runs from 0 at the data to the number of timesteps at the noise.
        end = float(scheduler.settings["num_train_timesteps"])
        config = {**config, "velocity": True, "noise_time": end, "data_time": 0.0}
    network = network._replace(plan=replace(network.plan, config=config))
    with about(network.label):
        model: Any = build_model(network.plan.family, config)
        check_fit(model.prediction == "velocity", model.learned_variance, scheduler)
    if not scheduler.ignored:
        return network
    names = ", ".join(f"{name}={settings[name]!r}" for name in scheduler.ignored)
    return network.noted(f"a {scheduler.class_name} has no {names}: not read, as by diffusers")


def open_network(path: Path, family: str | None, choices: Choices, weights: str | None) -> Network:
    """Returns the network at `path`, its names and shapes checked."""
    state = open_weights(path, weights)
    with about(path), suggesting_raw(state):
        state = select_network(state, family, weights)
    with about(path), suggesting_raw(state):
        layout = find_layout(state, family)
        check_options(layout, choices)
    config = read_config(path, layout.class_names, layout.tells)
    with about(path), suggesting_raw(state):
        if layout.wants_config and config is None and path.is_dir():
            _check_config_needed(layout, choices)
        state = layout.rename(state)
        with in_own_names(layout, state):
            plan = layout.plan(state, choices, config)
            check_plan(plan, state)
            check_places(plan, state.tensors)
    plan = replace(plan, notes=(*plan.notes, *quantized_notes(plan, state.tensors)))
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


def parse_dtype(dtype: str | None) -> np.dtype | None:
    """Returns the NumPy dtype of that name; None stays None."""
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}.")
    return bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
