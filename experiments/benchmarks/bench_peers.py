"""Quantizes one network by Qwix, torchao and qdit, and compares what each gives and costs.

    pip install qwix torchao torch      # in an environment of its own
    python experiments/benchmarks/bench_peers.py --out experiments/results/peers.json

About 3 minutes on 2 free cores. The network is a stack of MLP blocks with the same weights everywhere
(`peer_networks.py`); its inputs have a few strong channels. Every library quantizes weights to nearest, and inputs
while the network runs. Error: of the output against the float32 output of the same framework, in dB. Bytes held:
what the arrays say of themselves, or of what torch saves. Bytes on disk: Orbax (JAX) or torch.save. Compile time:
of the first call. Step: median of rounds in which all take turns. Lines: of the function here that a user would
write. A library that is not installed, or refuses, is a row that says so.

    pip install diffusers torch
    python experiments/benchmarks/bench_peers.py --network dit-s/2 --out experiments/results/peers_dit.json

A whole DiT-S/2 at 8 samples, as diffusers has it (eager and compiled by torch) and as qdit has it, float32 and
quantized (`peer_dit.py`), all taking turns in one run; about 4 minutes on 2 free cores. diffusers' is needed here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from peer_dit import dit_rows, dit_table, error_db
from peer_networks import LinenNet, NnxNet, linen_params, torch_net, weights_of

import qdit_jax as qdit
from qdit_jax.report import provenance
from qdit_jax.speed import Call, interleaved

BITS = ("w8a8", "w4a8")
GROUP = 128  # of w4a8; w8a8 has a scale per output channel and token


@dataclasses.dataclass
class Made:
    """A quantized network: how it is called, what it holds, and where its lines are."""

    call: Callable[[], Any]
    held: int
    on_disk: int


def qdit_linen(net, params, x, bits, numerics):
    size = GROUP if bits == "w4a8" else 0
    recipe = qdit.Recipe.preset(bits, layers=".*", group_size=size, act_group_size=0)
    return qdit.quantize_linen(
        net, params, recipe, example_args=(x,), strict=True, numerics=numerics
    )


def qdit_nnx(net, bits, numerics):
    size = GROUP if bits == "w4a8" else 0
    recipe = qdit.Recipe.preset(bits, layers=".*", group_size=size, act_group_size=0)
    return qdit.quantize_nnx(net, recipe, strict=True, numerics=numerics)


def qwix_rules(bits):
    import qwix

    kind, tile = ("int4", GROUP) if bits == "w4a8" else ("int8", None)
    return [qwix.QuantizationRule(weight_qtype=kind, act_qtype="int8", tile_size=tile)]


def qwix_linen(net, params, x, bits):
    import qwix

    model = qwix.quantize_model(net, qwix.PtqProvider(qwix_rules(bits)))
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    return model, qwix.quantize_params(params, abstract)


def qwix_nnx(net, x, bits):
    import qwix

    return qwix.quantize_model(net, qwix.PtqProvider(qwix_rules(bits)), x)


def torchao_net(net, bits):
    import torch
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerGroup,
        quantize_,
    )

    small = Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(GROUP))
    quantize_(net, small if bits == "w4a8" else Int8DynamicActivationInt8WeightConfig())
    return net


def made_linen(weights, x, bits, numerics: str | None) -> Made:
    """Returns a linen network quantized by qdit in these numerics, or by Qwix."""
    net, params = LinenNet(x.shape[-1], len(weights)), linen_params(weights)
    if numerics is not None:
        apply_fn, variables = qdit_linen(net, {"params": params}, x, bits, numerics)
        step = jax.jit(apply_fn)
    else:
        model, small = qwix_linen(net, params, x, bits)
        variables, step = {"params": small}, jax.jit(model.apply)
    return Made(lambda: step(variables, x), held(variables), on_disk(variables))


def made_nnx(weights, x, bits, numerics: str | None) -> Made:
    """Returns an NNX network quantized by qdit in these numerics, or by Qwix."""
    net = NnxNet(weights)
    small = qwix_nnx(net, x, bits) if numerics is None else qdit_nnx(net, bits, numerics)
    graph, state = nnx.split(small)
    step = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return Made(lambda: step(state, x), held(state), on_disk(nnx.to_pure_dict(state)))


def made_torch(weights, x, bits, compiled: bool) -> Made:
    """Returns a torch network quantized by torchao, or left as it is for `bits` None."""
    import torch

    net = torch_net(weights)
    if bits is not None:
        net = torchao_net(net, bits)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    size = len(buffer.getvalue())
    step, given = torch.compile(net) if compiled else net, torch.from_numpy(np.array(x))

    def call():
        with torch.no_grad():
            return step(given)

    return Made(call, size, size)


def held(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def on_disk(tree: Any) -> int:
    """Returns the bytes that Orbax writes for a tree."""
    import orbax.checkpoint as ocp

    arrays = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
    arrays = {name: leaf for name, leaf in arrays.items() if isinstance(leaf, jax.Array)}
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as writer:
        writer.save(Path(folder) / "one", arrays)
        writer.wait_until_finished()
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def lines(*functions: Callable[..., Any]) -> int:
    """Returns how many lines of code the bodies of functions have."""
    bodies = [inspect.getsource(function).splitlines()[1:] for function in functions]
    return sum(1 for body in bodies for line in body if line.strip())


# Title -> the library it needs, how it is made, and the lines that a user writes.
CONTENDERS: dict[str, tuple[str, Callable[..., Made], int]] = {
    "qdit, linen": ("qdit_jax", lambda *a: made_linen(*a, "simulated"), lines(qdit_linen)),
    "qdit, linen, integer": ("qdit_jax", lambda *a: made_linen(*a, "integer"), lines(qdit_linen)),
    "qdit, NNX": ("qdit_jax", lambda *a: made_nnx(*a, "simulated"), lines(qdit_nnx)),
    "qdit, NNX, integer": ("qdit_jax", lambda *a: made_nnx(*a, "integer"), lines(qdit_nnx)),
    "Qwix, linen": ("qwix", lambda *a: made_linen(*a, None), lines(qwix_linen, qwix_rules)),
    "Qwix, NNX": ("qwix", lambda *a: made_nnx(*a, None), lines(qwix_nnx, qwix_rules)),
    "torchao": ("torchao", lambda *a: made_torch(*a, False), lines(torchao_net)),
    "torchao, torch.compile": (
        "torchao",
        lambda *a: made_torch(*a, True),
        lines(torchao_net),
    ),
}


def full_precision(weights, x) -> dict[str, Made]:
    """Returns the network in float32, in JAX and where torch is in torch."""
    params, net = {"params": linen_params(weights)}, LinenNet(x.shape[-1], len(weights))
    step = jax.jit(net.apply)
    found = {"float32, JAX": Made(lambda: step(params, x), held(params), on_disk(params))}
    if importlib.util.find_spec("torch") is not None:
        found["float32, torch"] = made_torch(weights, x, None, False)
        found["float32, torch.compile"] = made_torch(weights, x, None, True)
    return found


def first_call(made: Made) -> tuple[np.ndarray, float]:
    """Returns the output and the seconds of the first call, compilation included."""
    began = time.perf_counter()
    out = np.asarray(jax.block_until_ready(made.call()))
    return out, time.perf_counter() - began


def rows_of(weights, x, num_rounds: int) -> list[dict[str, Any]]:
    """Returns a row for every library and every number of bits."""
    rows, ready = [], {}
    whole = full_precision(weights, x)
    references = {}
    for title, made in whole.items():
        references[title], seconds = first_call(made)
        rows.append({"title": title, "bits": "", "db": None, "compile_s": seconds, "lines": 0})
        ready[title, ""] = made
    for bits in BITS:
        for title, (library, make, count) in CONTENDERS.items():
            row: dict[str, Any] = {"title": title, "bits": bits, "lines": count}
            rows.append(row)
            if importlib.util.find_spec(library) is None:
                row["refused"] = f"{library} is not installed"
                continue
            try:
                made = make(weights, x, bits)
                out, row["compile_s"] = first_call(made)
            except Exception as error:  # what a library refuses is a result
                row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
                continue
            reference = "float32, torch" if "torch" in title else "float32, JAX"
            row["db"] = error_db(out, references[reference])
            ready[title, bits] = made
    timed(rows, ready, num_rounds)
    return rows


def timed(rows: list[dict[str, Any]], ready: dict[Any, Made], num_rounds: int) -> None:
    """Adds to the rows what the networks hold, and their times, taken in turn."""
    calls = [Call(" ".join(key), made.call) for key, made in ready.items()]
    seconds = interleaved(calls, num_rounds)
    for key, each in zip(ready, seconds, strict=True):
        (row,) = (r for r in rows if (r["title"], r["bits"]) == key)
        made = ready[key]
        row |= {"held": made.held, "on_disk": made.on_disk, "step_ms": 1e3 * float(np.median(each))}


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown."""
    text = [
        "| library | bits | error, dB | bytes held | bytes on disk | first call, s | step, ms | lines |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['title']} | {row['bits'].upper()} |"
        if "refused" in row:
            text.append(f"{start} {row['refused']} | | | | | {row['lines']} |")
            continue
        db = "" if row["db"] is None else f"{row['db']:.1f}"
        text.append(
            f"{start} {db} | {row['held']:,} | {row['on_disk']:,} | {row['compile_s']:.1f} | "
            f"{row['step_ms']:.1f} | {row['lines'] or ''} |"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=("mlp", "dit-s/2"), default="mlp")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step of dit-s/2")
    parser.add_argument("--width", type=int, default=384, help="of mlp")
    parser.add_argument("--depth", type=int, default=4, help="of mlp")
    parser.add_argument("--tokens", type=int, default=256, help="of mlp")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = ("batch",) if args.network == "dit-s/2" else ("width", "depth", "tokens")
    settings = {name: getattr(args, name) for name in ("network", *names, "rounds")}
    if args.network == "dit-s/2":
        rows = dit_rows(args.batch, args.rounds)
        print(dit_table(rows))
    else:
        weights = weights_of(args.width, args.depth)
        x = np.random.default_rng(1).standard_normal((2, args.tokens, args.width))
        x = x.astype(np.float32)
        x[..., :: args.width // 6] *= 8
        rows = rows_of(weights, jax.numpy.asarray(x), args.rounds)
        print(table(rows))
    if args.out is not None:
        found = {
            "made": provenance(),
            "versions": versions(),
            "settings": settings,
            "rows": rows,
        }
        args.out.write_text(json.dumps(found, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that are there."""
    from importlib.metadata import version

    names = ("qwix", "torchao", "torch", "diffusers", "flax")
    return {n: version(n) for n in names if importlib.util.find_spec(n) is not None}


if __name__ == "__main__":
    main()
