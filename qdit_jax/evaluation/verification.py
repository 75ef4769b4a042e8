"""`verify`: whether a quantized checkpoint does what it says, and keeps its user's limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qdit_jax.checkpoint import Checkpoint, dtype_of, load, materialized, with_dtype
from qdit_jax.errors import UserError, check_counts
from qdit_jax.evaluation.layer_facts import layer_facts
from qdit_jax.evaluation.limits import Layer, Limits, Outcome, outcomes
from qdit_jax.evaluation.pair_measures import interval, measured, paired_samples, sizes, timed
from qdit_jax.evaluation.runs import check_inputs, check_pairable
from qdit_jax.evaluation.trajectories import Contender, Protocol
from qdit_jax.files import PathLike
from qdit_jax.models import config_of, family_of
from qdit_jax.quant import OVER_TIME, ActQuant, QTensor
from qdit_jax.recipes import layer_paths
from qdit_jax.report import provenance
from qdit_jax.sampling import (
    PUBLISHED,
    Denoiser,
    Guidance,
    calls_per_step,
    check_diffusion_model,
    check_numerics,
    check_seed,
    check_whole,
    checked_batch_size,
    checkpoint_sampler,
    fitting_guidance,
    guidance_record,
    num_guided_channels,
    on_one_device,
    sample_attention,
    sample_rows,
)
from qdit_jax.types import Condition, ProgressFn, untold


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        passed: whether no layer is a silent no-op and every limit is kept.
        checkpoint, against: what the two are called.
        recipe: the name of the recipe; None where the checkpoint has none.
        settings: how it was measured, in JSON's types.
        layers: one entry per layer that is quantized or should be.
        attention: how many attentions of the quantized network each implementation computes.
        failures: what failed although no limit asks for it, one sentence each.
        limits: what became of every limit.
        notes: what a reader should know.
        output_db: of one network call on the reference's inputs, by timestep and condition.
        final_db: of the final latents: the mean over samples with its 95 % interval.
        num_bytes: of all parameters before and after, and bits per weight.
        milliseconds: of one network call of both, measured here; None without timing.
    """

    passed: bool
    checkpoint: str
    against: str
    recipe: str | None
    settings: dict[str, Any]
    layers: list[Layer]
    attention: dict[str, int]
    failures: list[str]
    limits: list[Outcome]
    notes: list[str]
    output_db: dict[str, Any]
    final_db: dict[str, Any]
    num_bytes: dict[str, Any]
    milliseconds: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """Returns everything in JSON's types, with date, versions and device."""
        return {**dataclasses.asdict(self), "made": provenance()}


def verify(
    checkpoint: Checkpoint | PathLike,
    *,
    against: Checkpoint | PathLike,
    min_db: float | int | None = None,
    min_layer_db: float | int | None = None,
    max_bytes: int | str | None = None,
    max_ms_ratio: float | int | None = None,
    implementation: str | None = None,
    num_samples: int = 8,
    steps: int | str = 10,
    guidance: Guidance | None = PUBLISHED,
    seed: int = 0,
    batch_size: int | None = None,
    numerics: str = "simulated",
    dtype: str | None = None,
    conditions: Condition = None,
    shape: Sequence[int] | None = None,
    timing: bool = True,
    progress_fn: ProgressFn = untold,
) -> Verification:
    """Returns whether a quantized checkpoint does what its recipe says, and how close it stays.

    A layer that the recipe names and that is not stored as it says is a failure, by its name. Each
    layer's output is compared with the reference's on the reference's own activations; see
    `layer_powers` for layers whose outputs are in other coordinates. The samples of both start from
    the same noise and have the same conditions.

    Args:
        checkpoint: quantized, or the path of one.
        against: the same network in full precision, or its path.
        min_db, min_layer_db, max_bytes, max_ms_ratio, implementation: limits, see `Limits`; those
            that are None ask for nothing.
        num_samples: of the paired samples, 2 or more.
        steps: of the sampler, as `checkpoint_sampler` takes them.
        guidance: of the samples, the network's own by default; without effect on a network that has no
            null condition.
        batch_size: samples per batch, by default as in `generate`.
        numerics: what quantized layers compute, `"simulated"` or `"integer"`.
        dtype: that both networks compute in; None leaves it to them.
        conditions: labels or prompts, cycled over the samples; every class by default.
        shape: of one sample, channels last; the network's own by default.
        timing: whether calls of both networks are timed.
        progress_fn: called with the number of samples just done.

    Raises:
        UserError: if the two are not the same network, `against` is quantized, nothing in
            `checkpoint` is, or a limit needs what is not measured.
        ValueError: if a setting does not fit the network.
    """
    limits = Limits(min_db, min_layer_db, max_bytes, max_ms_ratio, implementation)
    if max_ms_ratio is not None and not timing:
        raise UserError(f"max_ms_ratio={max_ms_ratio} needs the time of a call; use timing=True.")
    pair = [
        dataclasses.replace(contender, checkpoint=with_dtype(contender.checkpoint, dtype))
        for contender in contenders(checkpoint, against)
    ]
    full, ours = (contender.checkpoint for contender in pair)
    for contender in pair:
        check_whole(contender.checkpoint.params, "verify")
    check_numerics(ours.params, numerics)
    protocol = protocol_of(full, num_samples, steps, guidance, batch_size, shape)
    chosen = {"seed": check_seed(seed), "numerics": numerics, "conditions": conditions}
    protocol = dataclasses.replace(protocol, **chosen, shape=shape)  # type: ignore[arg-type]
    check_inputs(pair, protocol)
    # A guided call has the null samples as well.
    call_size = (protocol.batch_size or 1) * calls_per_step(full.model, protocol.guidance)
    rows = sample_rows(full.model, shape, conditions)
    with on_one_device():
        facts = layer_facts(ours, full, numerics=numerics, batch_size=call_size, rows=rows)
    first, condition, final = paired_samples(pair, protocol, progress_fn)
    model = full.model.clone(numerics=numerics)
    denoise_fns = [Denoiser(tree, model) for tree in (full.params, ours.params)]
    denoise_fns = jax.device_put(denoise_fns, jax.local_devices()[0])
    output_db, layers, notes = measured(denoise_fns, facts, first, condition)
    milliseconds = timed(denoise_fns, first, condition) if timing else None
    num_bytes, final_db = sizes(full.params, ours.params, facts), interval(final)
    failures = [*failures_of(layers, final), *schedule_failures(ours)]
    kept = outcomes(
        limits,
        layers,
        final_db=final_db["estimate"],
        num_bytes=(num_bytes["before"], num_bytes["after"]),
        ms_ratio=None if milliseconds is None else milliseconds["ratio"],
    )
    return Verification(
        passed=not failures and all(outcome.passed for outcome in kept),
        checkpoint=pair[1].title,
        against=pair[0].title,
        recipe=None if ours.recipe is None else ours.recipe.name,
        settings={**settings_of(protocol, steps), "dtype": dtype_of(full)},
        layers=layers,
        attention=sample_attention(ours.model, ours.params, shape, conditions),
        failures=failures,
        limits=kept,
        notes=[*notes, *notes_on(ours)],
        output_db=output_db,
        final_db=final_db,
        num_bytes=num_bytes,
        milliseconds=milliseconds,
    )


def contenders(
    checkpoint: Checkpoint | PathLike, against: Checkpoint | PathLike
) -> list[Contender]:
    """Returns the reference and the quantized checkpoint, in memory and with what they are called.

    Raises:
        UserError: if they are not the same network, or the reference is quantized.
    """
    pair = [loaded(against, "the reference"), loaded(checkpoint, "the checkpoint")]
    full = pair[0].checkpoint
    leaves = jax.tree.leaves(full.params, is_leaf=is_quantized_leaf)
    if full.recipe is not None or any(map(is_quantized_leaf, leaves)):
        name = "" if full.recipe is None else f" ({full.recipe.name})"
        raise UserError(
            f"against={pair[0].title} is quantized{name}; give the full-precision checkpoint."
        )
    check_same_network(pair[0], pair[1])
    check_pairable(pair)
    return pair


def is_quantized_leaf(leaf: object) -> bool:
    """Returns whether a leaf of a parameter tree is packed, or quantizes an input."""
    return isinstance(leaf, QTensor | ActQuant)


def loaded(source: Checkpoint | PathLike, title: str) -> Contender:
    """Returns a checkpoint, read if it is a path, with its path or `title` as its title."""
    if isinstance(source, Checkpoint):
        checkpoint = materialized(source)
    else:
        checkpoint, title = load(source), str(source)
    check_diffusion_model(checkpoint.model, title)
    return Contender(title, dataclasses.replace(checkpoint, vae=None))


def check_same_network(full: Contender, ours: Contender) -> None:
    """Raises `UserError` unless both have the same family, configuration and layers."""
    kinds = [kind_of(contender.checkpoint) for contender in (full, ours)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{ours.title} is of family {kinds[1]} and {full.title} of family {kinds[0]}; give the "
            "full-precision checkpoint of the same network."
        )
    a, b = (config_of(contender.checkpoint.model) for contender in (full, ours))
    if differing := [name for name in a if a[name] != b.get(name)]:
        name = differing[0]
        raise UserError(
            f"{ours.title} has {name}={b.get(name)!r} and {full.title} has {name}={a[name]!r}; give "
            "the full-precision checkpoint of the same network."
        )
    layers = [set(layer_paths(contender.checkpoint.params)) for contender in (full, ours)]
    if apart := sorted(layers[0] ^ layers[1]):
        lacking = full if apart[0] in layers[1] else ours
        raise UserError(
            f"{lacking.title} has no layer {apart[0]}; give checkpoints of one network."
        )


def kind_of(checkpoint: Checkpoint) -> str:
    """Returns the name of a network's family, or of its class where it has none."""
    try:
        return family_of(checkpoint.model).name
    except TypeError:
        return type(checkpoint.model).__name__


def protocol_of(
    full: Checkpoint,
    num_samples: int,
    steps: int | str,
    guidance: Guidance | None,
    batch_size: int | None,
    shape: Sequence[int] | None,
) -> Protocol:
    """Returns how both are sampled; raises `ValueError` if a setting does not fit the network."""
    check_counts(2, num_samples=num_samples)
    guidance = fitting_guidance(full.model, guidance)
    return Protocol(
        checkpoint_sampler(full, steps, shape=shape),
        {},
        num_samples,
        guidance=1.0 if guidance is None else guidance if callable(guidance) else float(guidance),
        guidance_channels=num_guided_channels(full.model, PUBLISHED),
        batch_size=checked_batch_size(num_samples, batch_size),
    )


def settings_of(protocol: Protocol, steps: int | str) -> dict[str, Any]:
    """Returns how it was measured, in JSON's types."""
    return {
        "sampler": type(protocol.sampler).__name__,
        "steps": steps,
        "num_samples": protocol.num_samples,
        "guidance": guidance_record(protocol.guidance),
        "seed": protocol.seed,
        "batch_size": protocol.batch_size,
        "numerics": protocol.numerics,
        **({} if protocol.shape is None else {"shape": list(protocol.shape)}),
    }


def failures_of(layers: list[Layer], final: np.ndarray) -> list[str]:
    """Returns a sentence for each layer that is not what the recipe says, or not finite."""
    found = []
    for layer in layers:
        if layer.problem is not None:
            found.append(f"{layer.path}: {layer.problem}")
        if layer.db is not None and not np.isfinite(layer.db):
            found.append(f"{layer.path}: its output is not finite")
    if bad := int((~np.isfinite(final)).sum()):
        found.append(f"{bad} of {len(final)} samples are not finite")
    return found


def schedule_failures(ours: Checkpoint) -> list[str]:
    """Returns a sentence if the recipe's bits over time are not those that are stored."""
    asked = None if ours.recipe is None else ours.recipe.over_time
    if asked is None:
        return []
    table = ours.params.get(OVER_TIME)
    if table is None:
        return ["the recipe changes bits over time, and the checkpoint does not"]
    stored = [table.levels[level] for level in np.asarray(table.level)]
    weight_bits = asked.weight_bits or (None,) * len(asked.act_bits)
    wanted = np.asarray(asked.timesteps, np.float32)
    same = list(zip(weight_bits, asked.act_bits, strict=True)) == stored
    if not same or not np.array_equal(wanted, table.timesteps):
        return ["the checkpoint changes bits over time otherwise than the recipe says"]
    return []


def notes_on(ours: Checkpoint) -> list[str]:
    """Returns what a reader should know beside the figures."""
    found = []
    if OVER_TIME in ours.params:
        found.append(
            "bits change over time: samples follow that, while layers, single calls and times are "
            "those of the layers' own bits"
        )
    if ours.recipe is None:
        found.append("the checkpoint has no recipe, so no layer is known that should be quantized")
    elif left := ours.recipe.operands_left(ours.params):
        found.append(
            f"{len(left)} attention operands match a rule of the recipe that is taken for layers "
            "alone; they are in full precision"
        )
    return found
