"""Folders of diffusers: one network with its config.json, or a whole pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdit_convert.json_file import read_json
from qdit_convert.pipelines import PIPELINE_INDEX
from qdit_convert.tensors import about


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
