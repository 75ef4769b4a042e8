"""Folders of diffusers: one network with its config.json, or a whole pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qdit_convert.json_file import read_json
from qdit_convert.settings import INDEX, PIPELINE
from qdit_convert.tensors import about
from qdit_convert.wan_settings import WAN_PIPELINE
from qdit_jax.diffusion import Table, read_scheduler, understood
from qdit_jax.errors import UserError

PIPELINE_INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"


@dataclass(frozen=True)
class Pipeline:
    """What convert knows of one of diffusers' pipelines.

    Attributes:
        settings: what its model_index.json may say.
        classes: its parts that are read, and their classes; a scheduler's are checked by its own
            table.
        vae_family: of its autoencoder.
    """

    settings: Table
    classes: Mapping[str, tuple[str, ...]]
    vae_family: str = "vae"


PIPELINES = {
    "DiTPipeline": Pipeline(
        PIPELINE,
        {
            "transformer": ("DiTTransformer2DModel", "Transformer2DModel"),
            "vae": ("AutoencoderKL",),
            "scheduler": (),
        },
    ),
    "WanPipeline": Pipeline(
        WAN_PIPELINE,
        {
            "transformer": ("WanTransformer3DModel",),
            "transformer_2": ("WanTransformer3DModel",),
            "vae": ("AutoencoderKLWan",),
            "scheduler": (),
        },
        "wan-vae",
    ),
}


class PipelineParts(NamedTuple):
    """The folders of a pipeline's parts, and what else to keep.

    Attributes:
        transformers: one network, or two experts.
        boundary: of two experts, the timestep from which on the first is run; else None.
        vae: None where the pipeline has none.
        vae_family: of the autoencoder.
        kept: of the index and the scheduler, for the checkpoint's metadata.
    """

    transformers: tuple[Path, ...]
    boundary: float | None
    vae: Path | None
    vae_family: str
    kept: dict[str, Any]


def is_pipeline(path: Path) -> bool:
    """Returns whether `path` is the folder of a whole pipeline."""
    return path.is_dir() and (path / PIPELINE_INDEX).is_file()


def read_config(
    path: Path, class_names: tuple[str, ...], tells: frozenset[str] = frozenset()
) -> dict[str, Any] | None:
    """Returns config.json of the weights at `path` (a folder, an index or a file), or None.

    That of a folder is its network's own. Beside a single file whose name is not one of diffusers'
    it may be of anything: it counts if it is of one of `class_names`, or says no class and has
    one of the settings `tells`.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    if not class_names or not file.is_file():
        return None
    own = path.is_dir() or ".index" in path.name or path.stem.startswith("diffusion_pytorch_model")
    with about(file):
        config = read_json(file)
    name = config.get("_class_name")
    own = own or name in class_names or (name is None and not tells.isdisjoint(config))
    return config if own else None


def read_pipeline(path: Path) -> PipelineParts:
    """Returns the folders of a pipeline's parts, and what else to keep.

    Raises:
        UserError: if it is another pipeline, a part that its index names is missing, or a setting
            of the index or of the scheduler is not understood.
    """
    with about(path):
        index = read_json(path / PIPELINE_INDEX)
        name = index.get("_class_name")
        if name not in PIPELINES:
            raise UserError(
                f"this is a {name}; of whole pipelines, convert reads {' and '.join(PIPELINES)} only."
            )
        known = PIPELINES[name]
        # A part that is left out stands in the index as [null, null].
        listed = {key: value for key, value in index.items() if value != [None, None]}
        settings = understood(INDEX, listed, known.settings)
        parts = {part: _part(path, settings, part, known.classes[part]) for part in known.classes}
        transformer = parts["transformer"]
        if transformer is None:
            raise UserError(f"{PIPELINE_INDEX} names no transformer.")
        kept: dict[str, Any] = {"pipeline": name}
        if parts["scheduler"] is not None:
            kept["scheduler"] = _scheduler(parts["scheduler"], settings["scheduler"][-1])
        if settings.get("id2label") is not None:
            kept["id2label"] = settings["id2label"]
        second = parts.get("transformer_2")
        boundary = _boundary(settings, kept, second is not None)
    networks = (transformer,) if second is None else (transformer, second)
    return PipelineParts(networks, boundary, parts["vae"], known.vae_family, kept)


def _boundary(
    settings: Mapping[str, Any], kept: Mapping[str, Any], has_two: bool
) -> float | None:
    """Returns the timestep from which on the first of two experts is run; None for one network.

    Raises:
        UserError: if there are two networks and no boundary, or the reverse.
    """
    ratio = settings.get("boundary_ratio")
    if has_two != (ratio is not None):
        parts = "two transformers" if has_two else "one transformer"
        raise UserError(
            f"{PIPELINE_INDEX} says boundary_ratio={ratio!r} for {parts}; two experts need a "
            "boundary, and one network has none."
        )
    if ratio is None:
        return None
    scheduler = kept.get("scheduler")
    count = read_scheduler(scheduler).settings["num_train_timesteps"] if scheduler else 1000
    return float(ratio * count)


def _scheduler(folder: Path, class_name: str) -> dict[str, Any]:
    """Returns the scheduler's settings unchanged, after checking that all are understood."""
    if not (folder / SCHEDULER).is_file():
        raise UserError(f"the folder scheduler lacks its {SCHEDULER}.")
    config = {"_class_name": class_name} | read_json(folder / SCHEDULER)
    if config["_class_name"] != class_name:
        raise UserError(
            f"{PIPELINE_INDEX} names a {class_name}, but {SCHEDULER} is of a "
            f"{config['_class_name']}; make them one."
        )
    read_scheduler(config)
    return config


def _part(
    path: Path, index: dict[str, Any], part: str, classes: tuple[str, ...]
) -> Path | None:
    entry = index[part]
    if entry is None:
        return None
    if len(entry) != 2 or entry[0] != "diffusers" or not isinstance(entry[1], str):
        raise UserError(
            f"{PIPELINE_INDEX} says {part}={entry!r}; only a class of diffusers is understood, "
            f'["diffusers", NAME].'
        )
    if classes and entry[1] not in classes:
        raise UserError(
            f"{PIPELINE_INDEX} says {part}={entry!r}; only {' or '.join(classes)} is understood."
        )
    if not (path / part).is_dir():
        raise UserError(
            f"{PIPELINE_INDEX} names the part {part}, but the folder {part} is missing."
        )
    return path / part
