"""The parts of `qdit quantize` that choose ranges and round on calibration inputs."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from qdit_jax.cli.paths import path_option

ROUNDINGS = ("nearest", "gptq", "gptq-authors", "adaround")
STAGES = ("block", "layer")
RANGES = ("minmax", "absmax", "percentile:P", "mse", "authors", "authors-mse", "authors-gptq")


def add_rounding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rounding on calibration inputs (not with nearest)")
    group.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="nearest",
        help="gptq: robust form; gptq-authors: as the Q-DiT release; adaround: learned",
    )
    group.add_argument(
        "--items",
        type=path_option,
        help="inputs from `qdit calibrate --collect`; sampled now if absent",
    )
    group.add_argument(
        "--num-samples", type=int, default=32, help="trajectories sampled (default 32)"
    )
    group.add_argument("--steps", type=int, default=50, help="steps a trajectory (default 50)")
    group.add_argument("--guidance", type=float, default=1.5)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--batch-size", type=int, default=8)
    group.add_argument(
        "--holdout",
        type=float,
        help="share of trajectories that check each layer against nearest (default 0.25; "
        "0 for gptq-authors)",
    )
    group.add_argument(
        "--stages",
        choices=STAGES,
        default="block",
        help="how much is rounded between two runs of the network (default block)",
    )


def range_named(text: str) -> Any:
    """Returns the range rule that `--range` names; raises `UserError` if it is unknown."""
    import qdit_jax as qdit

    name, _, number = text.partition(":")
    named = {rule.partition(":")[0]: rule for rule in RANGES}
    if name not in named or bool(number) != (":" in named[name]):
        raise qdit.UserError(
            f"--range {text} is not known; use {', '.join(RANGES)}, such as percentile:0.999."
        )
    if name == "percentile":
        try:
            return qdit.ranges.percentile(float(number))
        except ValueError as error:
            raise qdit.UserError(f"--range {text}: {error}") from error
    rule = getattr(qdit.ranges, name.replace("-", "_"))
    return rule() if name == "mse" else rule


def round_on_inputs(
    args: argparse.Namespace,
    checkpoint: Any,
    recipe: Any,
    stats: Any,
    show: Callable[[str, str], None],
) -> Any:
    """Returns the parameters rounded as `--rounding` says, showing every layer."""
    from tqdm import tqdm

    from qdit_jax.calibration import Items, layers_in_order
    from qdit_jax.models import Linear
    from qdit_jax.ptq import rounding

    authors = args.rounding == "gptq-authors"
    holdout = args.holdout if args.holdout is not None else (0.0 if authors else 0.25)
    items = Items.load(args.items) if args.items else collected(args, checkpoint, authors)
    stages_fn = stages_named(args.stages, authors)
    model = checkpoint.model
    apply = partial(model.apply, {"params": checkpoint.params})
    paths = layers_in_order(apply, Linear, *model.example_inputs())
    chosen = set(recipe.resolve(checkpoint.params))
    num_stages = sum(bool(chosen & set(stage)) for stage in stages_fn(paths))
    total = rounding.num_batches(items, holdout, args.batch_size, num_stages)
    note_few_tokens(checkpoint, recipe, len(items.x) * (1 - holdout))
    fallen = []

    def on_layer(layer: Any) -> None:
        note = f"{decibel(layer.nearest)} -> {decibel(layer.rounded)}"
        if layer.fell_back:
            fallen.append(layer.path)
            note += "  kept nearest"
        show(layer.path, note)

    with tqdm(total=total, unit="batch", disable=None) as bar:
        params = rounding.round_params(
            model,
            checkpoint.params,
            items,
            recipe=recipe,
            round_fn=round_named(args.rounding),
            stages_fn=stages_fn,
            holdout=holdout,
            stats=stats,
            batch_size=args.batch_size,
            on_layer=on_layer,
            progress_fn=bar.update,
        )
    inputs = "held-out inputs" if holdout else "the inputs themselves (nothing was held out)"
    print(
        f"output errors are measured on {inputs}; {len(fallen)} layers kept rounding to nearest, "
        "which was better there"
    )
    return params


def note_few_tokens(checkpoint: Any, recipe: Any, num_items: float) -> None:
    """Prints a sentence if a block's layer has fewer than 4 inputs a channel to be fitted to."""
    import qdit_jax as qdit
    from qdit_jax.sampling import latent_shape

    height, width, _ = latent_shape(checkpoint.model)
    num_tokens = int(num_items * height * width / checkpoint.model.patch_size**2)
    planned = [
        plan
        for plan in qdit.plan(checkpoint.params, recipe)
        if plan.spec.weight is not None and re.search("/(attn|mlp)/", plan.path)
    ]
    widest = max(planned, key=lambda plan: plan.shape[0], default=None)
    if widest is not None and num_tokens < 4 * widest.shape[0]:
        print(
            f"note: {num_tokens:,} inputs for the {widest.shape[0]:,} channels of {widest.path}; "
            "gains on inputs not seen need 4 a channel or more: raise --num-samples"
        )


def collected(
    args: argparse.Namespace,
    checkpoint: Any,
    authors: bool,
    progress_fn: Callable[[int], Any] | None = None,
) -> Any:
    """Returns the calibration items: conditional and null, or those of the release."""
    import jax

    from qdit_jax.calibration import authors_steps, collect_items, default_sampler

    return collect_items(
        checkpoint,
        jax.random.fold_in(jax.random.key(args.seed), 2),
        args.num_samples,
        sampler=default_sampler(checkpoint, args.steps),
        guidance=args.guidance,
        batch_size=min(args.batch_size, args.steps),
        choose_fn=authors_steps(args.seed) if authors else None,
        null=not authors,
        progress_fn=progress_fn,
    )


def round_named(name: str) -> Callable:
    from qdit_jax import quant

    functions: dict[str, Callable] = {
        "gptq": quant.gptq,
        "gptq-authors": quant.gptq_authors,
        "adaround": quant.adaround,
    }
    return functions[name]


def stages_named(name: str, authors: bool) -> Callable:
    from qdit_jax.ptq import by_block, by_block_authors, by_layer

    functions: dict[str, Callable] = {"block": by_block, "layer": by_layer}
    return by_block_authors if authors else functions[name]


def decibel(error: float) -> str:
    """Returns a relative squared error as a signal-to-error ratio in dB."""
    return f"{-10 * math.log10(max(error, 1e-30)):.1f}"


def with_authors_ranges(recipe: Any) -> Any:
    """Returns `recipe` with the grid of the release's GPTQ and its activation quantisers."""
    import qdit_jax as qdit

    def changed(spec: Any, range_fn: Any) -> Any:
        return spec and dataclasses.replace(spec, range_fn=range_fn)

    rules = tuple(
        qdit.Rule(
            rule.layers,
            qdit.LayerSpec(
                changed(rule.spec.weight, qdit.ranges.authors_gptq),
                changed(rule.spec.act, qdit.ranges.authors),
            ),
        )
        for rule in recipe.rules
    )
    return dataclasses.replace(recipe, rules=rules)
