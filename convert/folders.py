"""Folders of diffusers: one network with its config.json, or a whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdit_convert.json_file import read_json
from qdit_convert.tensors import about
from qdit_jax.errors import UserError

PIPELINE_INDEX = "model_index.json"
PIPELINES = ("DiTPipeline",)
SCHEDULER = "scheduler_config.json"


def is_pipeline(path: Path) -> bool:
    """Returns whether `path` is the folder of a whole pipeline."""
    return path.is_dir() and (path / PIPELINE_INDEX).is_file()


def read_config(path: Path) -> dict[str, Any] | None:
    """Returns config.json beside the weights at `path` (a folder or an index), or None."""
    folder = path if path.is_dir() else path.parent
    if (
        not path.is_dir()
        and ".index" not in path.name
        and not path.stem.startswith("diffusion_pytorch_model")
    ):
        return None
    file = folder / "config.json"
    if not file.is_file():
        return None
    with about(file):
        return read_json(file)


def read_pipeline(path: Path) -> tuple[Path, Path | None, dict[str, Any]]:
    """Returns the folders of the transformer and of the VAE (or None), and what else to keep.

    Raises:
        UserError: if it is another pipeline, or a part that its index names is missing.
    """
    with about(path):
        index = read_json(path / PIPELINE_INDEX)
        name = index.get("_class_name")
        if name not in PIPELINES:
            raise UserError(
                f"this is a {name}; of whole pipelines, convert reads {PIPELINES[0]} only."
            )
        parts = {part: _part(path, index, part) for part in ("transformer", "vae", "scheduler")}
        transformer = parts["transformer"]
        if transformer is None:
            raise UserError(f"{PIPELINE_INDEX} names no transformer.")
        kept: dict[str, Any] = {"pipeline": name}
        if parts["scheduler"] is not None:
            if not (parts["scheduler"] / SCHEDULER).is_file():
                raise UserError(f"the folder scheduler lacks its {SCHEDULER}.")
            kept["scheduler"] = read_json(parts["scheduler"] / SCHEDULER)
        if isinstance(index.get("id2label"), dict):
            kept["id2label"] = index["id2label"]
    return transformer, parts["vae"], kept


def _part(path: Path, index: dict[str, Any], part: str) -> Path | None:
    entry = index.get(part)
    if not isinstance(entry, list) or None in entry:
        return None
    if not (path / part).is_dir():
        raise UserError(
            f"{PIPELINE_INDEX} names the part {part}, but the folder {part} is missing."
        )
    return path / part
