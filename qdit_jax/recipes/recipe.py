"""Recipes: which layer of a network is quantised, and to what.

A recipe is a list of rules; a rule's pattern is a regular expression that must match a whole layer
path (`blocks_3/mlp/fc1`), and the last rule that matches a layer decides. A layer's own name is a
pattern as well, so that uniform presets and per-layer assignments are the same thing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, Literal

from flax.traverse_util import flatten_dict

from qdit_jax.files import PathLike, as_path
from qdit_jax.quant import ActSpec, WeightSpec, ranges

FORMAT_VERSION = 1
BLOCK_LINEARS = r"blocks_\d+/(attn/(qkv|proj)|mlp/(fc1|fc2))"
ATTENTION_OPERANDS = ("q", "k", "v", "softmax")
TABLE = "/embedding_table"
# Parts of a network beside the blocks' linears, and the layers or operands that make them up.
PARTS = {
    "adaln": r"(blocks_\d+|final_layer)/adaLN_modulation",
    "embedders": r"x_embedder/proj|t_embedder/mlp_\d",
    "final": r"final_layer/linear",
    "attention": r"blocks_\d+/attn/(q|k|v|softmax)",
}
# The least value of the tanh form of GELU is -0.17004.
GELU_SHIFT = 0.1701
PRESET = re.compile(r"w(\d+)a(\d+)")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer's kernel and input are quantised to; None leaves that side as it is."""

    weight: WeightSpec | None = None
    act: ActSpec | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """The spec of every layer whose whole path matches the regular expression `layers`."""

    layers: str
    spec: LayerSpec

    def matches(self, path: str) -> bool:
        return re.fullmatch(self.layers, path) is not None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules for a whole network; `name` says what it is in reports."""

    rules: tuple[Rule, ...]
    name: str = "custom"

    def get(self, path: str) -> LayerSpec | None:
        """Returns the spec of the last rule that matches `path`, or None to leave the layer."""
        for rule in reversed(self.rules):
            if rule.matches(path):
                return None if rule.spec == LayerSpec() else rule.spec
        return None

    def resolve(self, params: Any) -> dict[str, LayerSpec]:
        """Returns the spec of every layer of `params` that is quantised, by path.

        A label table, such as `y_embedder`, has no input: of a rule that matches it only the
        weights' settings apply.

        Raises:
            ValueError: if a rule matches no layer, or asks for weights where there are none.
        """
        layers = layer_paths(params)
        operands, tables = operand_paths(layers), table_paths(params)
        for rule in self.rules:
            if not any(rule.matches(path) for path in layers + operands + tables):
                raise ValueError(
                    f"recipe {self.name!r}: the pattern {rule.layers!r} matches no layer; "
                    f"layers are named like {', '.join(layers[:1] + layers[-1:] + operands[:1])}."
                )
        found = {path: spec for path in layers + operands if (spec := self.get(path)) is not None}
        for path in operands:
            if path in found and found[path].weight is not None:
                raise ValueError(
                    f"recipe {self.name!r}: {path} is an operand of the attention products and has "
                    "no weights; give it an act spec only."
                )
        weights = {path: spec.weight for path in tables if (spec := self.get(path)) is not None}
        return found | {path: LayerSpec(weight) for path, weight in weights.items() if weight}

    @classmethod
    def preset(
        cls,
        name: str,
        params: Any = None,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        act_group_size: int | None = None,
        act_mode: Literal["dynamic", "static"] = "dynamic",
        per_timestep: bool = False,
        range_fn: Any = ranges.minmax,
        act_range_fn: Any = ranges.minmax,
        scale_dtype: str = "float16",
        layers: str = BLOCK_LINEARS,
    ) -> Recipe:
        """Returns the uniform recipe `"w<bits>a<bits>"` for the four linears of every block.

        Args:
            name: such as `"w4a8"`; 16 bits leave that side as it is.
            params: checked against the recipe when given.
            group_size: input channels that share a scale; 0 is the whole channel.
            act_group_size: the activations' group size; the weights' when None.
            act_mode: `"dynamic"`, or `"static"` (needs calibration statistics).
            per_timestep: of static activations: a range for every calibrated timestep.
            range_fn, act_range_fn: of the weights and of the activations.
            scale_dtype: of the weights' scales, 16 bits each as the paper counts them.
            layers: the pattern of the layers to quantise.

        Raises:
            ValueError: if the name is no preset, or the pattern matches no layer.
        """
        match = PRESET.fullmatch(name)
        if match is None:
            raise ValueError(
                f"recipe={name!r} is no preset; use w<bits>a<bits> such as w8a8, w6a8 or w4a8 "
                "(bits 2 to 8, or 16 to leave a side as it is), or the path of a recipe.json."
            )
        weight_bits, act_bits = map(int, match.groups())
        weight = act = None
        if weight_bits != 16:
            weight = WeightSpec(weight_bits, group_size, symmetric, range_fn, scale_dtype)
        if act_bits != 16:
            size = group_size if act_group_size is None else act_group_size
            act = ActSpec(
                act_bits, size, symmetric, act_range_fn, act_mode, per_timestep=per_timestep
            )
        recipe = cls((Rule(layers, LayerSpec(weight, act)),), f"{name}-g{group_size}")
        if params is not None:
            recipe.resolve(params)
        return recipe

    def with_part(self, part: str, name: str, **options: Any) -> Recipe:
        """Returns the recipe with one more part quantised, with bits of its own.

        Args:
            part: one of `PARTS`: "adaln", "embedders", "final", or "attention", the operands q, k,
                v and softmax of the attention products (per head and token, over the head's
                channels or the row's tokens).
            name: as in `preset`; "attention" has no weights: `"w16a8"`.
            options: those of `preset`.

        Raises:
            ValueError: if there is no such part, or weights are asked of "attention".
        """
        if part not in PARTS:
            raise ValueError(f"part={part!r} is not known; use one of {', '.join(PARTS)}.")
        if part == "attention":
            options = {**options, "act_group_size": 0}
            if not name.startswith("w16"):
                raise ValueError(
                    f"name={name!r}: attention operands have no weights; use 'w16a8' or the like."
                )
        added = Recipe.preset(name, layers=PARTS[part], **options)
        return Recipe((*self.rules, *added.rules), f"{self.name}-{part}-{name}")

    def with_shifted_gelu(self, params: Any) -> Recipe:
        """Returns the recipe with unsigned symmetric codes for the inputs of the blocks' fc2.

        `GELU_SHIFT` is added before quantising and taken off afterwards, so that nothing is
        negative and no zero point is needed.

        Raises:
            ValueError: as `resolve`.
        """
        added = [
            Rule(
                re.escape(path),
                LayerSpec(
                    spec.weight,
                    dataclasses.replace(spec.act, symmetric=True, unsigned=True, shift=GELU_SHIFT),
                ),
            )
            for path, spec in self.resolve(params).items()
            if path.endswith("mlp/fc2") and spec.act is not None and spec.act.fmt is None
        ]
        return Recipe((*self.rules, *added), f"{self.name}-gelu")

    def to_json(self) -> dict[str, Any]:
        """Returns the recipe as JSON-serialisable values."""
        rules = [
            {
                "layers": rule.layers,
                "weight": rule.spec.weight and rule.spec.weight.to_json(),
                "act": rule.spec.act and rule.spec.act.to_json(),
            }
            for rule in self.rules
        ]
        return {"format_version": FORMAT_VERSION, "name": self.name, "rules": rules}

    @classmethod
    def from_json(cls, source: PathLike | dict[str, Any]) -> Recipe:
        """Returns the recipe in a JSON file, or in values that `to_json` returned.

        Raises:
            ValueError: if the file is absent or no recipe, or a setting is unknown.
        """
        data, where = (
            (source, "recipe") if isinstance(source, dict) else (read(source), str(source))
        )
        version = data.get("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{where}: format_version={version}; this release reads version {FORMAT_VERSION}."
            )
        rules = data.get("rules")
        if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
            raise ValueError(f"{where} is no recipe: it needs a list of objects named 'rules'.")
        return cls(
            tuple(rule_from_json(rule, f"{where}, rule {i}") for i, rule in enumerate(rules)),
            data.get("name", "custom"),
        )


def read(path: PathLike) -> dict[str, Any]:
    try:
        data = json.loads(as_path(path).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"recipe file {path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"recipe file {path} is not readable JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"recipe file {path} holds no JSON object.")
    return data


def rule_from_json(data: dict[str, Any], where: str) -> Rule:
    if unknown := sorted(set(data) - {"layers", "weight", "act"}):
        raise ValueError(f"{where}: unknown entry {unknown[0]!r}; known: layers, weight, act.")
    pattern = data.get("layers")
    if not isinstance(pattern, str):
        raise ValueError(f"{where}: layers={pattern!r} is no regular expression.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{where}: layers={pattern!r} is no regular expression: {error}."
        ) from error
    try:
        weight = data.get("weight")
        act = data.get("act")
        spec = LayerSpec(
            None if weight is None else WeightSpec.from_json(weight),
            None if act is None else ActSpec.from_json(act),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    return Rule(pattern, spec)


def layer_paths(params: Any) -> list[str]:
    """Returns the paths of all layers with a kernel, in the tree's order."""
    flat = flatten_dict(params, sep="/")
    return [path.removesuffix("/kernel") for path in flat if path.endswith("/kernel")]


def operand_paths(layers: list[str]) -> list[str]:
    """Returns the paths of the attention products' operands, such as `blocks_0/attn/q`."""
    attentions = [path.removesuffix("/qkv") for path in layers if path.endswith("/qkv")]
    return [f"{path}/{name}" for path in attentions for name in ATTENTION_OPERANDS]


def table_paths(params: Any) -> list[str]:
    """Returns the paths of the label tables, such as `y_embedder`."""
    flat = flatten_dict(params, sep="/")
    return [path.removesuffix(TABLE) for path in flat if path.endswith(TABLE)]
