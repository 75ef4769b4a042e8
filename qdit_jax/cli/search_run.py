"""The work of `qdit search`, once its options are read."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qdit_jax.allocation import (
    STRATEGIES,
    EvolutionSettings,
    FeatureDistance,
    Latency,
    Priced,
    Rollouts,
    SearchResult,
    Strategy,
    frechet_objective,
    search,
    seeds,
    strategy_named,
)
from qdit_jax.calibration import Items
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.cli.checkpoints import full_precision_checkpoint
from qdit_jax.cli.guidance_option import guidance_of
from qdit_jax.cli.progress import Bar, notes_are_shown
from qdit_jax.cli.prompts_option import Inputs
from qdit_jax.cli.search_pictures import draw_front, draw_map
from qdit_jax.errors import UserError
from qdit_jax.evaluation import (
    batch_size_of,
    check_kind,
    named_features,
    reference_statistics,
    sample_shape,
)
from qdit_jax.files import AnyPath, check_free, replaced_file
from qdit_jax.methods import CalibrationData
from qdit_jax.report import provenance
from qdit_jax.sampling import fitting_guidance


@dataclasses.dataclass(frozen=True)
class Job:
    """A search as the options describe it, checked against its checkpoint."""

    checkpoint: Checkpoint
    budget: str | None
    objective: str
    method: str
    strategy: Strategy
    space: dict[str, Any]
    rollouts: Rollouts
    seed: int
    reference: str | None
    features: tuple[str, ...]
    latency: Latency | None = None
    items: AnyPath | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Job:
        """Returns the search of parsed options.

        Raises:
            UserError: if the checkpoint is quantized, or an option does not fit it.
        """
        checkpoint = full_precision_checkpoint(
            options["checkpoint"], "a search compares with full precision", options["dtype"]
        )
        guidance = guidance_of(checkpoint, options["guidance"])
        fitting_guidance(checkpoint.model, guidance)  # refuses before anything is computed
        latency = None if options["latency"] is None else Latency.read(options["latency"])
        names = ("num_batches", "batch_size", "per_device")
        return cls(
            checkpoint,
            strategy=strategy_of(options),
            space=space_settings(options),
            rollouts=Rollouts(
                num_steps=options["steps"],
                guidance=guidance,
                **{name: options[name] for name in names},
                **Inputs.of(options, checkpoint, options["checkpoint"]).settings,
            ),
            features=tuple(options["features"]),
            latency=latency,
            **{
                name: options[name]
                for name in ("budget", "objective", "method", "seed", "reference", "items")
            },
        )

    def result(self, folder: AnyPath, *, is_first: bool) -> SearchResult:
        """Returns the result of the search, whose state is kept in `folder`.

        `is_first` says whether this process shows progress: the only one, or the first of several.
        """
        if is_first and any((folder / "state").glob("[0-9]*")):
            logging.getLogger("qdit_jax").info("resuming from %s", folder / "state")
        bar = Bar(0, "rollout", "searching", silent=not (is_first and notes_are_shown()))
        try:
            result = search(
                self.checkpoint,
                jax.random.key(self.seed),
                budget=self.priced(),
                objective=self.objective_fn(),
                strategy=self.strategy,
                space=self.space,
                rollouts=dataclasses.replace(
                    self.rollouts, data=self.data(), state=folder / "state"
                ),
                progress_fn=bar.tell,
            )
        finally:
            bar.close()
        result.history["made"] = {**provenance(), "seed": self.seed}
        return result

    def priced(self) -> Priced:
        """Returns the budget, which may name measured times."""
        return Priced(self.budget, {} if self.latency is None else {"latency": self.latency})

    def data(self) -> CalibrationData | None:
        """Returns what transforms and branches are fitted to; None has it sampled."""
        if self.items is not None:
            return CalibrationData(items=Items.load(self.items))
        conditions, shape = self.rollouts.conditions, self.rollouts.shape
        if conditions is None and shape is None:
            return None
        return CalibrationData(conditions=conditions, shape=shape)

    def objective_fn(self) -> str | FeatureDistance:
        """Returns the objective's name, or the Fréchet distance from the reference given."""
        if self.objective != "frechet":
            return self.objective
        if self.reference is None:
            raise UserError("--objective frechet needs --reference, an .npz or `demo`.")
        rollouts, model = self.rollouts, self.checkpoint.model
        shape = (rollouts.batch_size, *sample_shape(self.checkpoint, rollouts.shape))
        check_kind(self.features, shape, "the checkpoint")
        features_fn, _ = named_features(self.features)
        reference = reference_statistics(self.reference, self.features, features_fn)
        rollout = rollouts.rollout(self.checkpoint, guided=self.method != "qdit-release")
        key = jax.random.split(jax.random.key(self.seed))[0]
        given: dict[str, Any] = {"conditions": rollouts.conditions, "shape": rollouts.shape}
        data = seeds(model, key, rollouts.num_batches, rollouts.batch_size, **given)
        size = batch_size_of(self.features)
        return frechet_objective(self.checkpoint, rollout, data, features_fn, reference, size)


def strategy_of(options: Mapping[str, Any]) -> Strategy:
    """Returns the strategy that the options ask for."""
    method = options["method"]
    if options["minimize"] is not None or method == "cheapest":
        names = {"budget": options["minimize"], "within": options["within"]}
        given = {name: value for name, value in names.items() if value is not None}
        return dataclasses.replace(STRATEGIES["cheapest"], **given)
    if method == "default":
        return strategy_named(method)
    return strategy_named(method, EvolutionSettings(options["population"], options["generations"]))


def outcome(out: AnyPath, result: SearchResult) -> dict[str, Any]:
    """Returns the outcome as JSON values."""
    history = result.history
    return {
        "out": out,
        "recipe": out / "recipe.json",
        "cost": result.budget.shown(history["cost"]),
        "limit": result.budget.shown(history["limit"]),
        "measured": len(history["measured"]),
        **{name: history[name] for name in ("budget", "report", "seconds", "made")},
        **({"latency": history["latency"]} if "latency" in history else {}),
    }


def check_folder(out: AnyPath, force: bool, inputs: Sequence[AnyPath | None]) -> None:
    """Raises `UserError` if `out` holds other things, or a finished search and no `force`."""
    if (out / "recipe.json").exists() and not force:
        raise UserError(f"{out} holds a finished search; pass --force to replace it.")
    check_free(out, True, "search", inputs)


def space_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that describe the space, those that were given."""
    names = (
        *("weight_bits", "act_bits", "group_sizes", "sides", "layers"),
        *("transforms", "ranks", "formats", "scale_levels"),
        *("weight_symmetric", "act_formats", "act_scales"),
    )
    found = {name: options[name] for name in names}
    found |= {"pinned": dict(options["pin"]), "excluded": options["exclude"]}
    return {name: value for name, value in found.items() if value}


def write_result(out: AnyPath, result: SearchResult) -> None:
    """Writes history, pictures and, last of all, recipe.json: where it exists, all is written."""
    with replaced_file(out / "history.json") as path:
        path.write_text(json.dumps(result.history, indent=1))
    with replaced_file(out / "front.png") as path:
        draw_front(path, result)
    with replaced_file(out / "map.png") as path:
        draw_map(path, result)
    with replaced_file(out / "recipe.json") as path:
        path.write_text(json.dumps(result.recipe.to_json(), indent=1))


def closing(result: SearchResult, checkpoint: AnyPath, out: AnyPath, items: AnyPath | None) -> str:
    """Returns the last sentence: what was written, and the command that uses it."""
    command = f"qdit quantize {checkpoint} DIR --recipe {out / 'recipe.json'}"
    if any(rule.spec.plain != rule.spec for rule in result.recipe.rules):
        command += " --method best" + (f" --items {items}" if items is not None else "")
        command += ", which makes the transforms and branches that the recipe asks for"
    return f"wrote {out}: next, {command}"


def summary(result: SearchResult) -> str:
    """Returns the outcome in a few lines."""
    history = result.history
    report = history["report"]
    cost, limit = (result.budget.shown(history[name]) for name in ("cost", "limit"))
    spent = f"cost {cost:.6g} of {limit:.6g} allowed by {history['budget']}"
    if result.budget.is_mean_group:
        spent = f"mean group size {cost:.6g}, at least {limit:.6g} asked by {history['budget']}"
    if "within" in report:
        reference = result.budget.shown(report["reference_cost"])
        spent = (
            f"{history['budget']} {cost:.6g}, {cost / reference:.3f}x of the uniform assignment's; error "
            f"{report['error_db']:+.2f} dB of it ({report['within']} allowed)"
        )
    lines = [
        spent,
        f"{len(history['measured'])} assignments measured, "
        f"{report['network_evaluations']:,} network evaluations, {history['seconds']:.0f} s",
    ]
    if times := history.get("latency"):
        lines.append(
            f"a step of batch {times['batch']}: {cost:.4g} ms of these layers and "
            f"{times['remainder_ms']:.4g} ms that no choice changes, measured on "
            f"{times['provenance']['device']}"
        )
    if "rank_correlation" in report:
        found = report["rank_correlation"]
        verdict = "passed" if report["passed"] else "below .9: chosen by measured errors"
        if "within" in report:
            verdict = "the higher one led the search"
        lines.append(
            f"rank correlation additive {found['additive']:.2f}, joint {found['joint']:.2f}: {verdict}"
        )
    return "\n".join(lines)
