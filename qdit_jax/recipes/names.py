"""Names that rules may match: layers, label tables, attention operands, and parts of a family."""

from __future__ import annotations

from collections.abc import Sequence

from flax.traverse_util import flatten_dict

from qdit_jax.models import FAMILIES, OPERANDS_OF, TABLE, Family, family_of_params, layers_of
from qdit_jax.types import Params

NO_FAMILY = "are of no family that is known here"


def layer_paths(params: Params) -> list[str]:
    """Returns the paths of all layers with a kernel, in the tree's order."""
    return layers_of(flatten_dict(params, sep="/"))


def operand_paths(params: Params) -> list[str]:
    """Returns the paths of the attention products' operands, such as `blocks_0/attn/operands/q`.

    Empty for parameters that no family claims.
    """
    family = family_of_params(params)
    return [] if family is None else family.operands(layer_paths(params))


def operand_names(operands: Sequence[str], layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns the names by which a rule may match each operand, by its path.

    They are `attn/operands/q` and, unless a layer has that name, `attn/q`.
    """
    short = {path: path.replace(OPERANDS_OF, "/") for path in operands}
    return {path: (path,) if name in layers else (path, name) for path, name in short.items()}


def part_names() -> list[str]:
    """Returns the names of all parts of all families."""
    return list(dict.fromkeys(name for row in FAMILIES.values() for name in row.part_names))


def part_pattern(part: str, params: Params) -> str:
    """Returns the pattern of a part of the family that `params` belong to.

    Raises:
        ValueError: if no family claims them, or theirs has no such part.
    """
    return family_claiming(params).part_pattern(part)


def family_claiming(params: Params) -> Family:
    """Returns the family of parameters; raises `ValueError` if no row claims them."""
    family = family_of_params(params)
    if family is None:
        raise ValueError(
            f"these parameters {NO_FAMILY} (layers are named like "
            f"{', '.join(layer_paths(params)[:2])}); say which layers to quantize with layers=, a "
            "regular expression of whole paths."
        )
    return family


def table_paths(params: Params) -> list[str]:
    """Returns the paths of the label tables, such as `y_embedder`."""
    flat = flatten_dict(params, sep="/")
    return [path.removesuffix(TABLE) for path in flat if path.endswith(TABLE)]
