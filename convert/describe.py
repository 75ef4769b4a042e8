"""A description of PyTorch weights and of what convert would write; no values are read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qdit_convert.api import open_source
from qdit_convert.choices import Choices
from qdit_convert.families import find_layout
from qdit_convert.folders import is_pipeline
from qdit_convert.hub import source
from qdit_convert.names import select_network
from qdit_convert.opened import Network
from qdit_convert.readers import open_weights
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_jax.diffusion import process_text, read_scheduler, sampling_text
from qdit_jax.errors import UserError


def describe(src: str | os.PathLike, *, weights: str | None = None) -> dict[str, Any]:
    """Returns a JSON-able description of the PyTorch weights at `src`.

    Keys: `path`, `networks` (each with `family`, `layout`, `config`, `notes`, `weights`, `num_tensors`,
    `num_values`, `names` (what was done to them), `bytes`, `dtypes` and `parts`, both by bytes),
    `metadata`, `command` (what would
    convert it) and `problem` (why convert would refuse it, or None). Where convert would refuse,
    `networks` holds what can be said without knowing the network.

    Raises:
        UserError: if the file cannot be read at all.
    """
    with source(src) as (path, _):
        if not path.exists():
            raise UserError(f"{src} does not exist.")
        return {"path": str(src), "command": f"qdit convert {src} OUT"} | _described(path, weights)


def _described(path: Path, weights: str | None) -> dict[str, Any]:
    problem: str | None = None
    metadata: dict[str, Any] = {}
    try:
        networks, metadata = open_source(path, None, Choices(), weights)
        described = [_network(network) for network in networks]
    except UserError as error:
        problem = str(error)
        described = [_told(open_weights(folder, weights)) for folder in _folders(path)]
    return {"networks": described, "metadata": metadata, "problem": problem}


def _folders(path: Path) -> list[Path]:
    if not is_pipeline(path):
        return [path]
    return [
        path / part for part in ("transformer", "transformer_2", "vae") if (path / part).is_dir()
    ]


def _told(state: StateDict) -> dict[str, Any]:
    """Returns a description of weights that cannot be converted as they are."""
    try:
        state = select_network(state)
        layout = find_layout(state)
    except UserError:
        return _state(state)
    return {"family": layout.families[0], "layout": layout.title} | _state(state)


def _network(network: Network) -> dict[str, Any]:
    plan = network.plan
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in plan.config.items()}
    found: dict[str, Any] = {
        "family": plan.family,
        "layout": network.layout.title,
        "config": config,
    }
    found["notes"] = list(plan.notes)
    if len(network.layout.families) > 1:
        found["also"] = list(network.layout.families[1:])
    return found | _state(network.state)


def _state(state: StateDict) -> dict[str, Any]:
    tensors = state.tensors
    return {
        "weights": state.weights,
        "names": list(state.notes),
        "num_tensors": len(tensors),
        "num_values": sum(math.prod(t.shape) for t in tensors.values()),
        "bytes": sum(t.nbytes for t in tensors.values()),
        "dtypes": _bytes_by((_kind(t), t) for t in tensors.values()),
        "parts": _bytes_by((key.split(".")[0], t) for key, t in tensors.items()),
    }


def _kind(tensor: StoredTensor) -> str:
    """Returns the dtype of a tensor, or the format of a quantized weight."""
    return str(tensor.dtype) if tensor.quantized is None else tensor.quantized.format


def _bytes_by(named: Iterable[tuple[str, StoredTensor]]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for name, tensor in named:
        totals[name] = totals.get(name, 0) + tensor.nbytes
    return totals


def description_text(described: dict[str, Any]) -> str:
    """Returns the description as lines for a terminal."""
    lines = [described["path"]]
    for network in described["networks"]:
        lines += _network_lines(network)
    if described["metadata"].get("pipeline"):
        lines.append(f"  pipeline: {described['metadata']['pipeline']}")
    if described["metadata"].get("scheduler"):
        scheduler = read_scheduler(described["metadata"]["scheduler"])
        lines.append(
            f"  scheduler: {scheduler.class_name}: {process_text(scheduler)}; {sampling_text(scheduler)}"
        )
    if described["problem"] is None:
        lines.append(f"  convert with: {described['command']}")
    else:
        lines.append(f"  convert would say: {described['problem']}")
    return "\n".join(lines)


def _network_lines(network: dict[str, Any]) -> list[str]:
    lines = []
    if "family" in network:
        also = "".join(
            f" (the same names as {name}: --family {name})" for name in network.get("also", ())
        )
        lines.append(f"  family: {network['family']}, {network['layout']}{also}")
    if "config" in network:
        lines.append("  config: " + ", ".join(f"{k}={v}" for k, v in network["config"].items()))
    lines += [f"  note: {note}" for note in network.get("notes", ())]
    lines.append(
        f"  {network['num_tensors']} tensors ({network['weights']}), {network['num_values']:,} values, "
        f"{network['bytes']:,} bytes"
    )
    lines += [f"  names: {note}" for note in network["names"]]
    for title in ("dtypes", "parts"):
        lines.append(f"  {title}: " + ", ".join(f"{k} {v:,} B" for k, v in network[title].items()))
    return lines
