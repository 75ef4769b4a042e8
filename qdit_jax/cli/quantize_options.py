"""The options of `qdit quantize`: the recipe and the calibration data that they make.

An option that the recipe or another option leaves without effect is refused before an array is read.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.guidance_option import add_guidance
from qdit_jax.cli.numerics_option import add_dtype
from qdit_jax.cli.options import (
    count,
    pattern,
    positive_int,
    present_source,
    refuse_inert,
    seed_number,
    share,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.cli.prompts_option import Inputs, PromptsMissingError, add_embeds, add_size
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, as_path
from qdit_jax.methods import METHODS, method_named, present_name

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.methods import Method

SHIFTED_GELU_HELP = "unsigned codes for the inputs of fc2, after GELU"
STAGES = ("block", "layer")
RANGES = (
    "minmax",
    "absmax",
    "percentile:P",
    "mse",
    "qdit-release",
    "qdit-release-mse",
    "qdit-release-gptq",
)
ACT_MODES = ("dynamic", "static", "static-per-timestep")
# Parts of a network that have an option of their own.
PARTS = ("adaln", "embedders", "final", "attention")


# What `--rounding` called the methods.
ROUNDINGS = {"nearest": "rtn", "gptq-authors": "qdit_release"}
# Options of a method that learns from inputs, with their defaults: how they are sampled, ...
OF_SAMPLING = {
    **{"num_samples": 32, "steps": 50, "guidance": None, "seed": 0},
    **{"embeds": None, "prompts_from": None, "size": None, "frames": None, "fps": None},
}
# ... and how it is fitted to them.
OF_FITTING = {
    "items": None,
    "batch_size": 8,
    "holdout": None,
    "stages": None,
    "weight_timesteps": False,
}


@dataclasses.dataclass(frozen=True)
class PresetOptions:
    """Options that accompany a preset's name and do not go with a recipe's file."""

    group_size: int | None = None
    act_group_size: int | None = None
    symmetric: bool | None = None
    range: str | None = None
    act_mode: str | None = None
    layers: str | None = None
    shifted_gelu: bool = False
    adaln: str | None = None
    embedders: str | None = None
    final: str | None = None
    attention: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PresetOptions:
        """Returns the options among parsed arguments."""
        return cls(**{field.name: given[field.name] for field in dataclasses.fields(cls)})


def add_preset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-size",
        type=count,
        help="input channels per scale; 0 is the whole channel (default: the method's own, or 128)",
    )
    parser.add_argument(
        "--act-group-size", type=count, help="of the activations; the weights' if absent"
    )
    parser.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        help="no zero points (default: the method's own, or --no-symmetric)",
    )
    parser.add_argument(
        "--range",
        metavar="RULE",
        help=f"of the weights: {', '.join(RANGES)} (default: the method's own, minmax for rtn)",
    )
    parser.add_argument(
        "--act-mode",
        choices=ACT_MODES,
        help="ranges of activations: of the input at hand, or calibrated once, or for every timestep "
        "(default: the method's own, or dynamic)",
    )
    parser.add_argument(
        "--layers",
        type=pattern,
        metavar="REGEX",
        help="of the layers that a preset quantizes (default: the linears of every block)",
    )
    for part in ("adaln", "embedders", "final"):
        parser.add_argument(f"--{part}", metavar="WxAy", help=f"quantize {part} too, as w8a8")
    parser.add_argument(
        "--attention", metavar="W16Ay", help="quantize q, k, v and softmax too, as w16a8"
    )
    parser.add_argument("--shifted-gelu", action="store_true", help=SHIFTED_GELU_HELP)


def add_method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method, and the inputs it learns from (see `qdit methods`)")
    group.add_argument(
        "--method",
        choices=METHODS,
        type=present_name,
        help="how weights are quantized; `qdit methods` describes them (default: the one that "
        "`qdit recipes` names for the preset, best for most and for files, which samples inputs first; "
        "rtn looks at none)",
    )
    group.add_argument(
        "--rounding",
        dest="method",
        choices=METHODS,
        type=lambda name: ROUNDINGS.get(name, present_name(name)),
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    group.add_argument(
        "--items",
        type=path_option,
        help="inputs from `qdit calibrate --collect`; sampled now if absent",
    )
    group.add_argument(
        "--num-samples", type=positive_int, help="trajectories sampled (default %(default)s)"
    )
    group.add_argument(
        "--steps",
        type=positive_int,
        help="steps of a trajectory, and those that --steps-at counts (default %(default)s)",
    )
    add_embeds(group.add_argument)
    add_size(group.add_argument)
    add_guidance(group.add_argument)
    group.add_argument("--seed", type=seed_number)
    group.add_argument("--batch-size", type=positive_int)
    group.add_argument(
        "--holdout",
        type=share,
        help="share of trajectories that check each layer against nearest (default 0.25; "
        "0 for qdit_release)",
    )
    group.add_argument(
        "--stages",
        choices=STAGES,
        help="how much is rounded between two runs of the network (default block)",
    )
    add_dtype(group.add_argument)
    group.add_argument(
        "--weight-timesteps",
        action="store_true",
        help="inputs count by how much rounding at their timestep changes the final sample, measured "
        "first: one sampling of --steps for each of these steps (gptq, best and others like them)",
    )
    parser.set_defaults(**OF_SAMPLING, **OF_FITTING)


def recipe_file(text: str) -> AnyPath | None:
    """Returns the file that `--recipe` names, or None if it names a preset."""
    path = as_path(text)
    return path if path.suffix == ".json" or path.exists() else None


def recipe_and_method(given: Mapping[str, Any], params: Any) -> tuple[Any, Method]:
    """Returns the recipe, see `recipe_of`, and the method that was named or that it is meant for."""
    from qdit_jax.methods import method_for

    text, name = given["recipe"], given["method"]
    recipe = recipe_of(text, PresetOptions.of(given), name or method_for(text), params)
    return recipe, method_named(name or method_for(text if recipe_file(text) is None else recipe))


def recipe_of(text: str, options: PresetOptions, method: str, params: Any) -> Any:
    """Returns the recipe that `--recipe` names, a preset or a file.

    Raises:
        UserError: if options of a preset accompany a file.
    """
    import qdit_jax as qdit

    if recipe_file(text) is not None:
        if options != PresetOptions():
            raise UserError(
                f"--recipe {text} is a file: options such as --group-size belong "
                "to presets like w4a8; write them into the file."
            )
        return qdit.Recipe.from_json(text)
    return preset_of(text, options, params, method_named(method).settings)


def preset_of(name: str, options: PresetOptions, params: Any, own: Mapping[str, Any]) -> Any:
    """Returns the recipe of a preset, its parts and its options; `own` are the method's settings."""
    import qdit_jax as qdit

    settings = {**own, **given_settings(options)}
    if options.range is not None:  # it replaces all of the method's own
        settings.pop("act_range_fn", None)
    recipe = qdit.Recipe.preset(name, layers=options.layers, **settings)
    settings.pop("weight_format", None)  # it has the bits of the preset, a part has its own
    for part in PARTS:
        if (bits := getattr(options, part)) is not None:
            recipe = recipe.with_part(part, bits, **settings)
    if options.shifted_gelu:
        recipe = recipe.with_shifted_gelu(params)
    recipe.resolve(params)
    return recipe


def given_settings(options: PresetOptions) -> dict[str, Any]:
    """Returns the settings of `Recipe.preset` that the user has given."""
    given: dict[str, Any] = {
        "group_size": options.group_size,
        "symmetric": options.symmetric,
        "act_group_size": options.act_group_size,
        "range_fn": None if options.range is None else range_named(options.range),
    }
    if options.act_mode is not None:
        given["act_mode"] = options.act_mode.split("-")[0]
        given["per_timestep"] = options.act_mode == "static-per-timestep"
    return {name: value for name, value in given.items() if value is not None}


def range_named(text: str) -> Any:
    """Returns the range rule that `--range` names; raises `UserError` if it is unknown."""
    import qdit_jax as qdit

    name, _, number = present_source(text).replace("_", "-").partition(":")
    named = {rule.partition(":")[0]: rule for rule in RANGES}
    if name not in named or bool(number) != (":" in named[name]):
        raise UserError(
            f"--range {text} is not known; use {', '.join(RANGES)}, such as percentile:0.999."
        )
    if name == "percentile":
        try:
            return qdit.ranges.percentile(float(number))
        except ValueError as error:
            raise UserError(f"--range {text}: {error}") from error
    rule = getattr(qdit.ranges, name.replace("-", "_"))
    return rule() if name == "mse" else rule


def check_options(given: Mapping[str, Any], recipe: Any) -> None:
    """Raises `UserError` for an option that has no effect, or that the recipe needs and lacks."""
    specs = [rule.spec for rule in recipe.rules]
    is_static = any(spec.act and spec.act.mode == "static" for spec in specs)
    method = method_named(given["method"])
    if given["stats"] is not None and not is_static:
        raise UserError(
            f"--stats {given['stats']} has no effect: no activation is static; add --act-mode static, "
            "or leave it out."
        )
    counted = {"steps"} if given["steps_at"] else set()  # what has an effect by itself
    if given["weight_timesteps"]:
        counted |= set(OF_SAMPLING) - {"num_samples"}
    of_sampling = {name: value for name, value in OF_SAMPLING.items() if name not in counted}
    if not method.needs:
        reason = f"--method {given['method']} looks at no inputs; best, gptq and others do"
        refuse_inert(given, OF_FITTING | of_sampling | {"dtype": None}, reason)
    if given["weight_timesteps"] and not method.weighs_timesteps:
        reason = f"--method {given['method']} does not round by the Hessians of its inputs"
        refuse_inert(given, {"weight_timesteps": False}, reason)
    if given["items"] is not None:
        refuse_inert(given, of_sampling, f"the inputs come from --items {given['items']}")
    if not any(spec.act for spec in specs):
        of_inputs = {"act_mode": None, "act_group_size": None}
        refuse_inert(given, of_inputs, "the recipe leaves every input as it is")
    if not any(spec.weight for spec in specs) and not method.prepare:
        of_weights = {"method": "rtn", "range": None}
        refuse_inert(given, of_weights, "the recipe leaves every weight as it is")
    if given["shifted_gelu"] and not any(spec.act and spec.act.unsigned for spec in specs):
        no_gelu = "the recipe quantizes no input that follows a GELU"
        refuse_inert(given, {"shifted_gelu": False}, no_gelu)
    lacks = is_static and given["stats"] is None and not method.takes_own_ranges
    if lacks and not given["dry_run"]:
        raise UserError("static activations need --stats FILE from `qdit calibrate`.")


def inputs_of(given: Mapping[str, Any], checkpoint: Checkpoint) -> Inputs:
    """Returns what samples are made from, where the method samples any.

    Raises:
        UserError: if the network takes prompts and none are given.
    """
    samples = "items" in method_named(given["method"]).needs and given["items"] is None
    if not samples and not given["weight_timesteps"]:
        return Inputs()
    try:
        return Inputs.of(given, checkpoint, given["checkpoint"])
    except PromptsMissingError as error:
        raise UserError(f"{error} Or use --method rtn, which looks at no inputs.") from None


def data_of(
    given: Mapping[str, Any],
    guidance: Any,
    timestep_weights: Any = None,
    chosen: Inputs | None = None,
) -> Any:
    """Returns what the method learns from: files, or how to sample it; and how much inputs count."""
    import qdit_jax as qdit
    from qdit_jax.calibration import Items
    from qdit_jax.checkpoint import default_dtype

    items, stats = given["items"], given["stats"]
    names = ("seed", "num_samples", "batch_size", "holdout", "stages")
    return qdit.CalibrationData(
        items=None if items is None else Items.load(items),
        stats=None if stats is None else qdit.Stats.load(stats),
        num_steps=given["steps"],
        dtype=given["dtype"] or default_dtype(),
        timestep_weights=timestep_weights,
        guidance=guidance,
        **(chosen or Inputs()).settings,
        **{name: given[name] for name in names},
    )
