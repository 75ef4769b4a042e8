"""What `qdit quantize` refuses before it reads an array: options that would do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdit_jax.cli.options import refuse_inert
from qdit_jax.errors import UserError

# Options of rounding on calibration inputs, with their defaults.
OF_ROUNDING = {
    "items": None,
    "num_samples": 32,
    "steps": 50,
    "guidance": 1.5,
    "seed": 0,
    "batch_size": 8,
    "holdout": None,
    "stages": None,
}
OF_SAMPLING = {"num_samples": 32, "steps": 50, "guidance": 1.5, "seed": 0}


def check_options(options: Mapping[str, Any], recipe: Any) -> None:
    """Raises `UserError` for an option that the recipe and the others leave without effect."""
    specs = [rule.spec for rule in recipe.rules]
    is_static = any(spec.act and spec.act.mode == "static" for spec in specs)
    if options["stats"] is not None and not is_static:
        raise UserError(
            f"--stats {options['stats']} has no effect: no activation is static; add --act-mode static, "
            "or leave it out."
        )
    if options["method"] == "rtn":
        refuse_inert(options, OF_ROUNDING, "--method rtn looks at no inputs")
    if options["items"] is not None:
        refuse_inert(options, OF_SAMPLING, f"the inputs come from --items {options['items']}")
    if not any(spec.act for spec in specs):
        of_inputs = {"act_mode": "dynamic", "act_group_size": None}
        refuse_inert(options, of_inputs, "the recipe leaves every input as it is")
    if not any(spec.weight for spec in specs):
        of_weights = {"method": "rtn", "range": None}
        refuse_inert(options, of_weights, "the recipe leaves every weight as it is")
    if options["shifted_gelu"] and not any(spec.act and spec.act.unsigned for spec in specs):
        refuse_inert(
            options, {"shifted_gelu": False}, "the recipe quantizes no input that follows a GELU"
        )
