"""Whole pipelines of diffusers: a table of their classes, and which parts of a folder are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qdit_convert.json_file import read_json
from qdit_convert.settings import INDEX, PIPELINE
from qdit_convert.tensors import about, listing
from qdit_jax.diffusion import Setting, Table, read_scheduler, understood
from qdit_jax.errors import UserError

PIPELINE_INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
NETWORKS = ("transformer", "vae", "scheduler")  # the parts that are read
PROMPTS = ("text_encoder", "tokenizer")  # what makes embeddings of prompts


@dataclass(frozen=True)
class Pipeline:
    """One class of pipelines.

    Attributes:
        transformer, vae: the classes that these parts may have; a scheduler's are checked by its own
            table.
        left_out: parts that are not read, such as text encoders: a note names those that are there.
        settings: what its index may say beside its parts.
        fields: fields of the network that the class settles.
        process: completes "the pipeline has no scheduler: sampled as the published ...".
    """

    transformer: tuple[str, ...]
    vae: tuple[str, ...] = ("AutoencoderKL",)
    left_out: tuple[str, ...] = ()
    settings: Table = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    process: str = "network, on linear betas"

    @property
    def table(self) -> Table:
        """Returns the settings of its index."""
        parts = {part: Setting("list", optional=True) for part in (*NETWORKS, *self.left_out)}
        return {**PIPELINE, **parts, **self.settings}


PIXART = Pipeline(
    ("PixArtTransformer2DModel", "Transformer2DModel"),
    left_out=PROMPTS,
    process="PixArt, on linear betas",
)
PIPELINES: dict[str, Pipeline] = {
    "DiTPipeline": Pipeline(
        ("DiTTransformer2DModel", "Transformer2DModel"),
        settings={"id2label": Setting("table", optional=True)},
        process="DiT, on linear betas",
    ),
    "PixArtAlphaPipeline": Pipeline(
        PIXART.transformer, PIXART.vae, PROMPTS, fields={"text_length": 120}, process=PIXART.process
    ),
    "PixArtSigmaPipeline": Pipeline(
        PIXART.transformer, PIXART.vae, PROMPTS, fields={"text_length": 300}, process=PIXART.process
    ),
}


class Parts(NamedTuple):
    """What a pipeline's folder holds: its class, folders of networks, and what else to keep."""

    row: Pipeline
    transformer: Path
    vae: Path | None
    left_out: tuple[str, ...]
    kept: dict[str, Any]


def read_pipeline(path: Path) -> Parts:
    """Returns the parts of the pipeline in a folder.

    Raises:
        UserError: if it is another pipeline, a part that its index names is missing, or a setting
            of the index or of the scheduler is not understood.
    """
    with about(path):
        index = read_json(path / PIPELINE_INDEX)
        name = index.get("_class_name")
        if name not in PIPELINES:
            raise UserError(
                f"this is a {name}; of whole pipelines, convert reads {listing(PIPELINES, 9)} only."
            )
        row = PIPELINES[name]
        # A part that is left out stands in the index as [null, null].
        listed = {key: value for key, value in index.items() if value != [None, None]}
        settings = understood(INDEX, listed, row.table)
        allowed = {"transformer": row.transformer, "vae": row.vae, "scheduler": ()}
        parts = {part: folder_of(path, settings, part, allowed[part]) for part in NETWORKS}
        transformer = parts["transformer"]
        if transformer is None:
            raise UserError(f"{PIPELINE_INDEX} names no transformer.")
        kept: dict[str, Any] = {"pipeline": name}
        if parts["scheduler"] is not None:
            kept["scheduler"] = scheduler_settings(parts["scheduler"], settings["scheduler"][-1])
        if settings.get("id2label") is not None:
            kept["id2label"] = settings["id2label"]
    left_out = tuple(part for part in row.left_out if settings[part] is not None)
    return Parts(row, transformer, parts["vae"], left_out, kept)


def scheduler_settings(folder: Path, class_name: str) -> dict[str, Any]:
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


def folder_of(
    path: Path, index: Mapping[str, Any], part: str, classes: tuple[str, ...]
) -> Path | None:
    """Returns the folder of a part of one of `classes` (of any, if empty); None if it has none."""
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
