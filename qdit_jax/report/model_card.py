"""The card of a checkpoint for the hub: what it is, from what, how large, how close, how to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.models import config_of, family_of, layers_of
from qdit_jax.quant import QTensor
from qdit_jax.report.provenance import provenance, provenance_text

NOTHING: Mapping[str, str] = MappingProxyType({})


def model_card(
    checkpoint: Checkpoint,
    repo: str,
    file: str,
    *,
    license: str | None = None,
    measured: Mapping[str, Any] | None = None,
    names: Mapping[str, str] = NOTHING,
) -> str:
    """Returns the Markdown text, with the hub's header.

    Args:
        repo: where it is going to be, `OWNER/NAME`.
        file: the exported file beside it.
        license: of the weights, as the hub spells it; None says nothing.
        measured: what `metrics.json` of an evaluation holds.
        names: of its paired measures, in words.
    """
    metadata = checkpoint.metadata
    parts = [
        header(metadata, license),
        f"# {repo.partition('/')[2]}",
        summary(checkpoint),
        layers_table(checkpoint),
        method_text(metadata),
        measured_table(measured or {}, names),
        loading_text(repo, file),
        f"Card written by {provenance_text(provenance())}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def header(metadata: Mapping[str, Any], license: str | None) -> str:
    """Returns the YAML between dashes that the hub reads."""
    lines = ["library_name: qdit_jax", "tags: [jax, diffusion, quantized]"]
    if license is not None:
        lines.append(f"license: {license}")
    if "hub" in metadata:
        lines.append(f"base_model: {str(metadata['hub']).partition('@')[0]}")
    return "\n".join(["---", *lines, "---"])


def summary(checkpoint: Checkpoint) -> str:
    """Returns what the network is, where it comes from, and its bytes."""
    metadata = checkpoint.metadata
    config = ", ".join(f"{name}={value}" for name, value in config_of(checkpoint.model).items())
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params))
    source = metadata.get("hub") or metadata.get("source")
    came = f" It was converted from {source}." if source else ""
    vae = "" if checkpoint.vae is None else " The autoencoder is in the file, in full precision."
    family = family_of(checkpoint.model).name
    return f"A network of family `{family}` ({config}), {own:,} bytes of parameters.{came}{vae}"


def layers_table(checkpoint: Checkpoint) -> str:
    """Returns how many layers are stored as what."""
    flat = flattened(checkpoint.params)
    layers = layers_of(flat)
    counts = Counter(stored_as(flat[f"{layer}/kernel"]) for layer in layers)
    rows = [f"| {what} | {count} |" for what, count in counts.most_common()]
    return "\n".join(["| weights of linear layers | layers |", "|---|---|", *rows])


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by their paths; a quantized kernel is one leaf."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= flattened(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return found


def stored_as(kernel: Any) -> str:
    """Returns the number format of a kernel in words."""
    if not isinstance(kernel, QTensor):
        return str(kernel.dtype)
    what = f"{kernel.bits} bits" if kernel.fmt is None else kernel.fmt.name
    groups = f"groups of {kernel.group_size}" if kernel.group_size else "one scale per channel"
    return f"{what}, {groups}{', two levels of scales' if kernel.has_levels else ''}"


def method_text(metadata: Mapping[str, Any]) -> str:
    """Returns how it was quantized."""
    found = metadata.get("quantization")
    if not found:
        return ""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    notes = "".join(f"\n- {note}" for note in found.get("notes", ()))
    return (
        f"Quantized by method `{found['method']}`, recipe `{found['recipe']}`, on {found['date']} "
        f"({versions}).{notes}"
    )


def measured_table(measured: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Returns the paired measures of an evaluation with their intervals, and on what they rest."""
    rows = []
    for title, found in measured.get("paired", {}).items():
        for name, at in found.items():
            what = names.get(name, name)
            rows.append(
                f"| {title} | {what} | {at['estimate']:.4g} ({at['low']:.4g} to {at['high']:.4g}) |"
            )
    if not rows:
        return "How close its samples are to full precision has not been measured here."
    settings = measured.get("settings", {})
    kept = ("num_samples", "steps", "sampler", "guidance", "seed", "numerics")
    said = ", ".join(f"{name} {settings[name]}" for name in kept if name in settings)
    head = "| model | against full precision, same noise | mean (95%) |\n|---|---|---|"
    return "\n".join([head, *rows]) + (f"\n\nMeasured with {said}." if said else "")


def loading_text(repo: str, file: str) -> str:
    """Returns how to load it and run it."""
    return (
        "```bash\npip install 'qdit-jax[hub]'\n```\n\n"
        "```python\nimport qdit_jax as qdit\n\n"
        f'checkpoint = qdit.load("hf:{repo}/{file}")\n'
        'out = checkpoint.model.apply({"params": checkpoint.params}, x, timestep, condition)\n```'
    )
