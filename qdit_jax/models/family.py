"""The networks, and the table from a family's name to its class."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict

# Family name -> (module, class); modules load when they are first asked for.
FAMILIES = {
    "dit": ("qdit_jax.models.dit", "DiT"),
    "vae": ("qdit_jax.models.vae", "AutoencoderKL"),
    "inception": ("qdit_jax.models.inception", "InceptionV3"),
}
# Fields of a linen module, or of how it runs, that are no part of a stored configuration.
NOT_CONFIG = {"parent", "name", "numerics", "implementation"}


def build_model(family: str, config: dict[str, Any]) -> nn.Module:
    """Returns the network of `family` with the fields in `config` (lists become tuples).

    Raises:
        ValueError: if the family or a field is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; use one of {', '.join(FAMILIES)}.")
    cls = model_class(family)
    known = {f.name for f in dataclasses.fields(cls)} - NOT_CONFIG
    if unknown := sorted(set(config) - known):
        raise ValueError(
            f"config of family {family!r} has unknown fields {unknown}; known: {sorted(known)}."
        )
    return cls(**{name: tuple_of_list(value) for name, value in config.items()})


def config_of(model: nn.Module) -> dict[str, Any]:
    """Returns the JSON-able configuration of a model made by `build_model`."""
    fields = (f for f in dataclasses.fields(model) if f.name not in NOT_CONFIG)
    return {f.name: getattr(model, f.name) for f in fields}


def family_of(model: nn.Module) -> str:
    """Returns the family name of a model; raises `TypeError` for a class that has none."""
    for family, (_, name) in FAMILIES.items():
        if type(model).__name__ == name and isinstance(model, model_class(family)):
            return family
    raise TypeError(f"{type(model).__name__} belongs to no family that can be saved.")


def model_class(family: str) -> Any:
    module, name = FAMILIES[family]
    return getattr(import_module(module), name)


def tuple_of_list(value: Any) -> Any:
    return tuple(tuple_of_list(v) for v in value) if isinstance(value, list) else value


def abstract_params(model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the path (joined by `/`), shape and dtype of every parameter, computing nothing."""
    inputs = model.example_inputs()
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return flatten_dict(variables["params"], sep="/")
