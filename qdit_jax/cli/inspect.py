"""`qdit inspect`: what is in a checkpoint, or in a PyTorch file."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qdit_jax.cli.guidance_option import Given, add_guidance, guidance_of
from qdit_jax.cli.options import SubParsers, positive_int, seed_number, verb_parser
from qdit_jax.cli.paths import path_option
from qdit_jax.files import AnyPath, as_path

HELP = """\
Print a summary. Of a checkpoint (folder or exported file): the network's configuration, parameters,
bytes and dtypes of each part, the recipe. Of a PyTorch file: what `qdit convert` would write.

With --stats, sample a few pictures with the checkpoint and write a report on what matters for
quantization: the spread of weights and activations over channels, outlier channels, and ranges over
the timesteps. The folder --out gets report.html (self-contained), the charts as PNG, and the
numbers in stats.json.

examples:
  qdit inspect xl2-w4a8
  qdit inspect xl2-w4a8 --json
  qdit inspect xl2-w4a8.safetensors
  qdit inspect DiT-XL-2-256x256.pt
  qdit inspect xl2 --stats --out xl2-stats --num-samples 4 --steps 10
"""
# Options of --stats with their defaults.
STATS = {"num_samples": 4, "steps": 10, "guidance": None, "seed": 0, "batch_size": 4, "out": None}


def add_parser(subparsers: SubParsers) -> None:
    """Adds the verb with its options."""
    parser = verb_parser(subparsers, "inspect", HELP)
    parser.add_argument(
        "path",
        metavar="PATH",
        type=path_option,
        help="a checkpoint folder, an exported .safetensors file, or PyTorch weights",
    )
    parser.add_argument(
        "--stats",
        action="store_true",
        help="sample, and write a report on weights and activations (checkpoint folders only)",
    )
    add = parser.add_argument_group("options of --stats").add_argument
    add("--out", type=path_option, help="folder to write (PATH-stats in the current folder)")
    add("--num-samples", type=positive_int, help="number of samples (4)")
    add("--steps", type=positive_int, help="sampling steps (10)")
    add_guidance(add)
    add("--batch-size", type=positive_int, help="samples per batch (4)")
    add("--seed", type=seed_number, help="seed of the noise (0)")
    add("--force", action="store_true", help="replace the report of an earlier run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the summary, or writes the report; returns the same as values."""
    from qdit_jax.checkpoint import exported_parts
    from qdit_jax.errors import UserError

    is_checkpoint = (args.path / "model.json").is_file()
    if args.stats:
        if not is_checkpoint and args.path.exists():
            raise UserError(
                f"{args.path} is not a checkpoint folder; --stats runs the model: first "
                f"`qdit convert {args.path} OUT` first."
            )
        chosen = {name: getattr(args, name) for name in STATS if getattr(args, name) is not None}
        default_out = as_path(f"{args.path.resolve().name}-stats")
        settings = {**STATS, "out": default_out, **chosen}
        return draw_stats(args.path, **settings, force=args.force)
    if args.force:
        raise UserError("--force is an option of --stats.")
    if given := [name for name in STATS if getattr(args, name) is not None]:
        raise UserError(f"--{given[0].replace('_', '-')} is an option of --stats.")
    parts = folder_parts(args.path) if is_checkpoint else exported_parts(args.path)
    if parts is None:
        from qdit_convert import describe, description_text

        described = describe(args.path)
        print(description_text(described))
        return described
    summary = summarize(str(args.path), parts)
    print_tree(summary)
    return summary


def folder_parts(folder: AnyPath) -> dict[str, Any]:
    """Returns `model`, `recipe` and `vae` of a checkpoint folder, as an exported file has them."""
    from qdit_jax.checkpoint import read_description

    recipe, vae = folder / "recipe.json", folder / "vae"
    return {
        "model": read_description(folder),
        "recipe": json.loads(recipe.read_text()) if recipe.exists() else None,
        "vae": folder_parts(vae) if (vae / "model.json").is_file() else None,
    }


def draw_stats(
    path: AnyPath,
    out: AnyPath,
    *,
    num_samples: int,
    steps: int,
    guidance: Given | None,
    seed: int,
    batch_size: int,
    force: bool,
) -> dict[str, Any]:
    """Samples, writes the report, prints each layer's spread, and returns the numbers.

    Raises:
        UserError: if there is no checkpoint of a diffusion transformer, or `out` is taken.
    """
    import jax

    from qdit_jax.calibration import calibrate, default_sampler
    from qdit_jax.cli.checkpoints import diffusion_checkpoint
    from qdit_jax.cli.progress import Bar
    from qdit_jax.report import check_report_folder, write_model_report
    from qdit_jax.sampling import guidance_record

    check_report_folder(out, overwrite=force, inputs=[path])
    checkpoint = diffusion_checkpoint(path)
    scale = guidance_of(checkpoint, guidance)
    sampler = default_sampler(checkpoint, steps)
    with Bar(num_samples, "sample", "sampling") as bar:
        stats = calibrate(
            checkpoint,
            jax.random.key(seed),
            num_samples,
            sampler=sampler,
            guidance=scale,
            batch_size=min(batch_size, num_samples),
            progress_fn=bar.tell,
        )
    protocol = {
        "sampler": type(sampler).__name__,
        "steps": steps,
        "samples": num_samples,
        "guidance": guidance_record(scale),
        "seed": seed,
    }
    summary = write_model_report(out, path.resolve().name, checkpoint.params, stats, protocol)
    print_outliers(summary)
    print(f"wrote {out / 'report.html'}, {out / 'stats.json'} and 5 charts")
    return summary


def print_outliers(summary: dict[str, Any]) -> None:
    """Prints the spread of each layer's weights and inputs."""
    for path, entry in summary["inputs"].items():
        weights = summary["weights"][path]
        print(
            f"{path}: weights spread {weights['input_spread']:.2f} over inputs, "
            f"{weights['output_spread']:.2f} over outputs; inputs: {entry['num_outliers']} outlier "
            f"channels, the largest {entry['largest_over_median']:.1f} x median, drift "
            f"{entry['drift']:.2f}"
        )


def summarize(path: str, found: dict[str, Any]) -> dict[str, Any]:
    """Returns the family, configuration, counts, bytes by part, and recipe of a checkpoint."""
    from qdit_jax.models import family_named
    from qdit_jax.quant import kernel_of_other
    from qdit_jax.recipes import OverTime
    from qdit_jax.report import part_of

    description = found["model"]
    family = family_named(description["family"])
    parts: dict[str, dict[str, Any]] = {}
    for name, leaf in description["params"].items():
        part = parts.setdefault(part_of(name, family), {"values": 0, "bytes": 0, "dtypes": {}})
        arrays = [leaf] if leaf["type"] == "array" else list(leaf["arrays"].values())
        # What stands beside parameters has no shape, or is a kernel's second form.
        if "shape" in leaf and kernel_of_other(name) is None:
            part["values"] += product(leaf["shape"])
        for array in arrays:
            size = product(array["shape"]) * itemsize(array["dtype"])
            part["bytes"] += size
            kind = f"{leaf['bits']}-bit" if leaf["type"] == "QTensor" else array["dtype"]
            kind += " levels" if "channel_scale" in leaf.get("arrays", {}) else ""
            part["dtypes"][kind] = part["dtypes"].get(kind, 0) + size
    summary = {
        "path": path,
        "family": description["family"],
        "config": description["config"],
        "values": sum(part["values"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "parts": parts,
        "metadata": description.get("metadata", {}),
    }
    if family.is_diffusion and (found_sampling := sampling_facts(description)):
        summary["sampling"] = found_sampling
    if used := implementations(description["params"]):
        summary["implementations"] = used
        if "sampling" in summary:
            summary["attention"] = attention(description)
    if found.get("recipe"):
        summary["recipe"] = found["recipe"]
        if (over_time := found["recipe"].get("over_time")) is not None:
            summary["bits_over_time"] = OverTime.from_json(over_time).text
    if found.get("vae"):
        summary["vae"] = summarize(f"{path}/vae", found["vae"])
    return summary


def sampling_facts(description: dict[str, Any]) -> dict[str, Any]:
    """Returns how a network is sampled by default: sampler, guidance, and the shift of a flow.

    Empty if its scheduler or its configuration cannot be read; `qdit sample` says why.
    """
    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.diffusion import sampler_named
    from qdit_jax.models import build_model
    from qdit_jax.sampling import guidance_record, own_guidance, own_sampler

    metadata = description.get("metadata", {})
    try:
        model = build_model(description["family"], description["config"])
        name = own_sampler(Checkpoint(model, {}, metadata=metadata))
    except (ValueError, TypeError):
        return {}
    found = {"sampler": name, "guidance": guidance_record(own_guidance(model))}
    if "shift" in sampler_named(name).options:
        own = getattr(model, "flow_shift", 1.0)
        found["shift"] = "as the scheduler says" if metadata.get("scheduler") else own
    return found


def implementations(manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Returns how many quantized layers each implementation computes, by numerics.

    Counted for JAX's default platform, its dtype and one row of input; empty in full precision.
    """
    from qdit_jax.checkpoint import abstract_params, default_dtype
    from qdit_jax.kernels import NUMERICS, implementations_used
    from qdit_jax.sampling import on_one_device

    params, found = abstract_params(manifest), {}
    for numerics in NUMERICS:
        try:
            with on_one_device():
                used = implementations_used(params, numerics, dtype=default_dtype())
        except ValueError:  # integer numerics of a layer whose input is not quantized
            continue
        if used:
            found[numerics] = used
    return found


def attention(description: dict[str, Any]) -> dict[str, int]:
    """Returns how many attentions each implementation computes on JAX's default platform, in its dtype."""
    from qdit_jax.checkpoint import abstract_params, default_dtype
    from qdit_jax.models import build_model
    from qdit_jax.sampling import sample_attention

    model = build_model(description["family"], description["config"])
    if hasattr(model, "dtype"):
        model = model.clone(dtype=default_dtype())
    return sample_attention(model, abstract_params(description["params"]))


def product(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def itemsize(dtype: str) -> int:
    import ml_dtypes  # noqa: F401  (numpy then knows bfloat16)
    import numpy as np

    return np.dtype(dtype).itemsize


def print_tree(value: dict[str, Any], indent: str = "") -> None:
    """Prints nested dicts as indented lines; long lists and rules on one line each."""
    for key, entry in value.items():
        if isinstance(entry, dict) and entry:
            print(f"{indent}{key}:")
            print_tree(entry, indent + "  ")
        elif isinstance(entry, list) and entry and isinstance(entry[0], dict):
            print(f"{indent}{key}:")
            for item in entry:
                print(f"{indent}  {json.dumps(item)}")
        elif isinstance(entry, int) and not isinstance(entry, bool) and entry > 9999:
            print(f"{indent}{key}: {entry:,}")
        else:
            print(f"{indent}{key}: {entry}")
