"""A whole DiT-S/2 of random weights, the same in diffusers (torch), compiled by torch, and in qdit.

The file that diffusers writes is converted as a user would convert it, so both have the same weights, and their
outputs in float32 have to agree. Its modulation is random, not zero as before training.

Dimensions: B samples.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import qdit_jax as qdit
from qdit_convert import convert
from qdit_jax.sampling import running_params
from qdit_jax.speed import Call, interleaved, ratio

SIZES = {
    **{"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12},  # of DiT-S/2
    **{"in_channels": 4, "out_channels": 8, "sample_size": 32, "patch_size": 2},
    **{"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero", "attention_bias": True},
    **{"activation_fn": "gelu-approximate", "norm_elementwise_affine": False},
}
# Title -> preset, group size of weights and inputs.
RECIPES = {
    "W8A8, per channel": ("w8a8", 0),
    "W4A8, per channel": ("w4a8", 0),
    "W4A8, groups of 128": ("w4a8", 128),
    "W4A8, groups of 32": ("w4a8", 32),
    "W4A8, two levels": ("w4a8-fast", None),
}
MOST_APART = 1e-4  # of the two float32 outputs, as a share of the largest value


class Inputs(NamedTuple):
    """What a call of the network takes."""

    x: np.ndarray  # [B, 32, 32, 4]
    timestep: np.ndarray  # [B]
    labels: np.ndarray  # [B]


def inputs_of(batch: int) -> Inputs:
    """Returns noise, timesteps and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, 32, 32, 4)).astype(np.float32)
    return Inputs(x, rng.integers(0, 1000, batch), rng.integers(0, 1000, batch))


def torch_dit() -> Any:
    """Returns diffusers' network of random weights."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(**SIZES).eval()
    # Every block has an embedder of its own there, all with the same weights in published files.
    first = net.transformer_blocks[0].norm1.emb.state_dict()
    for block in net.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return net


def converted(net: Any) -> qdit.Checkpoint:
    """Returns the same network in JAX."""
    with tempfile.TemporaryDirectory() as folder:
        net.save_pretrained(Path(folder) / "torch")
        convert(Path(folder) / "torch", Path(folder) / "jax")
        return qdit.load(Path(folder) / "jax")


def torch_call(net: Any, inputs: Inputs, compiled: bool) -> Callable[[], Any]:
    """Returns what calls diffusers' network on the inputs, `[B, H, W, C]`."""
    import torch

    step = torch.compile(net) if compiled else net
    x = torch.from_numpy(inputs.x.transpose(0, 3, 1, 2).copy())
    timestep, labels = torch.from_numpy(inputs.timestep), torch.from_numpy(inputs.labels)

    def call() -> Any:
        with torch.no_grad():
            found = step(x, timestep=timestep, class_labels=labels, return_dict=False)[0]
        return found.permute(0, 2, 3, 1)

    return call


def jax_call(ckpt: qdit.Checkpoint, inputs: Inputs, numerics: str) -> Callable[[], Any]:
    """Returns what calls our network, compiled as the sampler compiles it."""
    model = ckpt.model.clone(numerics=numerics)
    params = running_params(model, ckpt.params)
    given = jax.tree.map(jax.numpy.asarray, tuple(inputs))
    step = jax.jit(lambda params, *given: model.apply({"params": params}, *given))
    return lambda: step(params, *given)


def calls_of(batch: int) -> dict[tuple[str, str], Callable[[], Any]]:
    """Returns what is timed, by title and numerics: float32 first, in torch where diffusers is there."""
    net, inputs = torch_dit(), inputs_of(batch)
    ckpt = converted(net)
    found = {
        ("float32, qdit", ""): jax_call(ckpt, inputs, "simulated"),
        ("float32, diffusers", ""): torch_call(net, inputs, False),
        ("float32, diffusers, torch.compile", ""): torch_call(net, inputs, True),
    }
    check_same(*(np.asarray(found[key]()) for key in list(found)[:2]))
    for title, (preset, size) in RECIPES.items():
        sizes = {} if size is None else {"group_size": size}
        small = qdit.quantize(ckpt, "rtn", qdit.Recipe.preset(preset, **sizes))
        for numerics in ("simulated", "integer"):
            found[title, numerics] = jax_call(small, inputs, numerics)
    return found


def check_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Raises `ValueError` if the outputs of the two frameworks differ."""
    apart = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not apart <= MOST_APART:
        raise ValueError(
            f"The two float32 networks differ by {apart:.1e} of the largest output, more than "
            f"{MOST_APART:.0e}: their times cannot be compared."
        )


def dit_rows(batch: int, num_rounds: int) -> list[dict[str, Any]]:
    """Returns a row for every network: its error, its time, and both ratios to float32 with intervals.

    All take turns in one run. Ratios are medians over rounds, with their 95 % intervals.
    """
    calls = calls_of(batch)
    outputs = [np.asarray(jax.block_until_ready(call())) for call in calls.values()]
    seconds = interleaved([Call(" ".join(key), call) for key, call in calls.items()], num_rounds)
    ours, _, theirs = seconds[:3]
    return [
        {
            **{"title": title, "numerics": numerics},
            "db": error_db(out, outputs[0]) if numerics else None,
            "step_ms": 1e3 * float(np.median(each)),
            "of_ours": dataclasses.asdict(ratio(each, ours)),
            "of_theirs": dataclasses.asdict(ratio(each, theirs)),
        }
        for (title, numerics), out, each in zip(calls, outputs, seconds, strict=True)
    ]


def error_db(out: np.ndarray, reference: np.ndarray) -> float:
    """Returns signal to error in decibels."""
    return float(10 * np.log10(np.mean(reference**2) / np.mean((out - reference) ** 2)))


def dit_table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown."""
    text = [
        "| network | numerics | error, dB | step, ms | of float32, qdit | of float32, torch.compile |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        db = "" if row["db"] is None else f"{row['db']:.1f}"
        ratios = (
            "{median:.2f} ({low:.2f} to {high:.2f})".format(**row[name])
            for name in ("of_ours", "of_theirs")
        )
        text.append(
            f"| {row['title']} | {row['numerics']} | {db} | {row['step_ms']:.0f} | {' | '.join(ratios)} |"
        )
    return "\n".join(text)
