"""Recipes: which layer of a network is quantized, and to what.

A recipe is a list of rules; a rule's pattern is a regular expression that must match a whole layer
path (`blocks_3/mlp/fc1`), and the last rule that matches a layer decides. A layer's own name is a
pattern as well, so that uniform presets and per-layer assignments are the same thing.

The operands of the attention products (`blocks_3/attn/operands/q`, `k`, `v`, `softmax`; in short
`blocks_3/attn/q`) are named beside the layers. A rule that matches a layer or a label table speaks of those alone: `.*` or `blocks_3/.*`
leaves the operands as they are. A rule whose pattern matches operands only quantizes them; it has an
act spec and no weights. A rule without any spec leaves all that it matches, operands included.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flax.traverse_util import flatten_dict

from qdit_jax.errors import check_pattern
from qdit_jax.files import PathLike, as_path, read_once
from qdit_jax.models import FAMILIES, OPERANDS_OF, TABLE, Family, family_of_params, layers_of
from qdit_jax.quant import ActSpec, WeightSpec, ranges

FORMAT_VERSION = 1
# Stands for a part of whatever family the parameters turn out to be, as in `part:blocks`.
PART = "part:"
NO_FAMILY = "are of no family that is known here"
# The least value of the tanh form of GELU is -0.17004.
GELU_SHIFT = 0.1701
PRESET = re.compile(r"w(\d+)a(\d+)(-all)?")
EVERY_LAYER = ".*"


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer's kernel and input are quantized to; None leaves that side as it is."""

    weight: WeightSpec | None = None
    act: ActSpec | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """The spec of every layer whose whole path matches the regular expression `layers`."""

    layers: str
    spec: LayerSpec

    def __post_init__(self) -> None:
        check_pattern("layers", self.layers)

    def matches(self, path: str) -> bool:
        if self.layers.startswith(PART):
            raise ValueError(
                f"layers={self.layers!r} stands for layers of a family; bind the recipe to "
                "parameters first: recipe.bound(params)."
            )
        return re.fullmatch(self.layers, path) is not None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules for a whole network; `name` says what it is in reports.

    `family` is the name of the family that the rules were bound to, if any.
    """

    rules: tuple[Rule, ...]
    name: str = "custom"
    family: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def get(self, *names: str) -> LayerSpec | None:
        """Returns the spec of the last rule that matches a layer's name, or None to leave it."""
        for rule in reversed(self.rules):
            if any(rule.matches(name) for name in names):
                return None if rule.spec == LayerSpec() else rule.spec
        return None

    def bound(self, params: Any) -> Recipe:
        """Returns the recipe with `part:` rules as patterns of the family that `params` are of.

        Raises:
            ValueError: if there are such rules and no family claims the parameters.
        """
        if not any(rule.layers.startswith(PART) for rule in self.rules):
            return self
        return self.bound_to(family_claiming(params))

    def bound_to(self, family: Family) -> Recipe:
        """Returns the recipe with `part:` rules as patterns of `family`.

        Raises:
            ValueError: if the family has no such part.
        """
        rules = tuple(
            dataclasses.replace(rule, layers=family.part_pattern(rule.layers.removeprefix(PART)))
            if rule.layers.startswith(PART)
            else rule
            for rule in self.rules
        )
        return dataclasses.replace(self, rules=rules, family=family.name)

    def resolve(self, params: Any) -> dict[str, LayerSpec]:
        """Returns the spec of every layer and operand of `params` that is quantized, by path.

        A label table, such as `y_embedder`, has no input: of a rule that matches it only the
        weights' settings apply.

        Raises:
            ValueError: if a rule matches no layer, asks for weights where there are none, or the
                rules quantize nothing.
        """
        self = self.bound(params)
        layers, tables = layer_paths(params), table_paths(params)
        names = operand_names(operand_paths(params), layers)
        broad = [self.speaks_of_layers(rule, [*layers, *tables], names) for rule in self.rules]
        found = {path: spec for path in layers if (spec := self.get(path)) is not None}
        for path, called in names.items():
            if (spec := self.operand_spec(called, broad)) is not None:
                found[path] = spec
        weights = {path: spec.weight for path in tables if (spec := self.get(path)) is not None}
        found |= {path: LayerSpec(weight) for path, weight in weights.items() if weight}
        if not found:
            raise ValueError(
                f"recipe {self.name!r} quantizes nothing: it has no rule, or every rule leaves what "
                "it matches at 16 bits; give a layer a weight or an act spec."
            )
        return found

    def speaks_of_layers(
        self, rule: Rule, layers: Sequence[str], operands: Mapping[str, Sequence[str]]
    ) -> bool:
        """Returns whether a rule matches a layer or table, so that operands are none of its business.

        Args:
            operands: the names of every attention operand, by its path.

        Raises:
            ValueError: if it matches nothing at all, or operands alone and has weights.
        """
        if any(map(rule.matches, layers)):
            return True
        matched = next((p for p, names in operands.items() if any(map(rule.matches, names))), None)
        if matched is None:
            shown = [*layers[:1], *layers[-1:], *list(operands)[:1]]
            raise ValueError(
                f"recipe {self.name!r}: the pattern {rule.layers!r} matches no layer; "
                f"layers are named like {', '.join(shown)}."
            )
        if rule.spec.weight is not None:
            raise ValueError(
                f"recipe {self.name!r}: {matched} is an operand of the attention products and has "
                "no weights; give it an act spec only."
            )
        return False

    def operand_spec(self, names: Sequence[str], broad: Sequence[bool]) -> LayerSpec | None:
        """Returns the spec of an attention operand; `broad` says which rules speak of layers."""
        for rule, speaks_of_layers in zip(reversed(self.rules), reversed(broad), strict=True):
            leaves = rule.spec == LayerSpec()
            if any(map(rule.matches, names)) and (leaves or not speaks_of_layers):
                return None if leaves else rule.spec
        return None

    def operands_left(self, params: Any) -> list[str]:
        """Returns the attention operands that a rule matches and that stay as they are.

        They lie under a pattern that speaks of layers too, such as `.*`.
        """
        self = self.bound(params)
        found = self.resolve(params)
        names = operand_names(operand_paths(params), layer_paths(params))
        return [
            p for p, called in names.items() if p not in found and self.get(*called) is not None
        ]

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
        layers: str | None = None,
    ) -> Recipe:
        """Returns the uniform recipe `"w<bits>a<bits>"` for the linear layers of every block.

        Args:
            name: such as `"w4a8"`; 16 bits leave that side as it is. `"w4a8-all"` quantizes every
                layer and label table, the attention operands excepted.
            params: a `Checkpoint` or a parameter tree, which the recipe is bound to and checked
                against. Without it the rule says `part:blocks`, of whatever family it is used on.
            group_size: input channels that share a scale; 0 is the whole channel.
            act_group_size: the activations' group size; the weights' when None.
            act_mode: `"dynamic"`, or `"static"` (needs calibration statistics).
            per_timestep: of static activations: a range for every calibrated timestep.
            range_fn, act_range_fn: of the weights and of the activations.
            scale_dtype: of the weights' scales, 16 bits each as the paper counts them.
            layers: the pattern of the layers to quantize; by default the part `"blocks"` of the
                family. Parameters that no family claims need it.

        Raises:
            ValueError: if the name is no preset or leaves everything at 16 bits, or the pattern
                cannot be read, matches no layer, or accompanies `-all`.
        """
        weight_bits, act_bits, takes_all = preset_bits(name)
        if takes_all and layers is not None:
            raise ValueError(
                f"layers={layers!r} does not go with recipe={name!r}: give one of both."
            )
        if layers is None:
            layers = EVERY_LAYER if takes_all else f"{PART}blocks"
        weight = act = None
        if weight_bits != 16:
            weight = WeightSpec(weight_bits, group_size, symmetric, range_fn, scale_dtype)
        if act_bits != 16:
            size = group_size if act_group_size is None else act_group_size
            act = ActSpec(
                act_bits, size, symmetric, act_range_fn, act_mode, per_timestep=per_timestep
            )
        rule = Rule(f"{PART}blocks" if layers is None else layers, LayerSpec(weight, act))
        recipe = cls((rule,), f"{name}-g{group_size}")
        if params is not None:
            params = getattr(params, "params", params)
            family = family_of_params(params)
            recipe = recipe.bound(params) if family is None else recipe.bound_to(family)
            recipe.resolve(params)
        return recipe

    def with_part(self, part: str, name: str, **options: Any) -> Recipe:
        """Returns the recipe with one more part quantized, with bits of its own.

        Args:
            part: "adaln", "embedders", "final" or another part of the family, or "attention"
                (or "self_attention", "cross_attention"): the operands q, k, v and softmax of the
                products (per head and token, over the head's channels or the row's tokens).
            name: as in `preset`; "attention" has no weights: `"w16a8"`.
            options: those of `preset`.

        Raises:
            ValueError: if there is no such part, or weights are asked of "attention".
        """
        if part not in (known := part_names()):
            raise ValueError(f"part={part!r} is not known; use one of {', '.join(known)}.")
        if part.endswith("attention"):
            options = {**options, "act_group_size": 0}
            if preset_bits(name, part)[0] != 16:
                raise ValueError(
                    f"{part}={name!r}: attention operands have no weights; use 'w16a8' or the like."
                )
        if preset_bits(name, part)[2]:
            raise ValueError(f"{part}={name!r}: -all belongs to a whole recipe; leave it out here.")
        added = Recipe.preset(name, layers=PART + part, **options)
        name = f"{self.name}-{part}-{name}"
        recipe = dataclasses.replace(self, rules=(*self.rules, *added.rules), name=name)
        return recipe if self.family is None else recipe.bound_to(FAMILIES[self.family])

    def with_shifted_gelu(self, params: Any) -> Recipe:
        """Returns the recipe with unsigned symmetric codes for inputs that a GELU makes.

        `GELU_SHIFT` is added before quantizing and taken off afterwards, so that nothing is
        negative and no zero point is needed.

        Raises:
            ValueError: as `resolve`.
        """
        family = family_of_params(params)
        if family is None:
            raise ValueError(f"these parameters {NO_FAMILY}, so no layer behind a GELU is known.")
        added = [
            Rule(
                re.escape(path),
                LayerSpec(
                    spec.weight,
                    dataclasses.replace(spec.act, symmetric=True, unsigned=True, shift=GELU_SHIFT),
                ),
            )
            for path, spec in self.resolve(params).items()
            if re.fullmatch(family.gelu_inputs, path)
            and spec.act is not None
            and spec.act.fmt is None
        ]
        return dataclasses.replace(self, rules=(*self.rules, *added), name=f"{self.name}-gelu")

    def to_json(self) -> dict[str, Any]:
        """Returns the recipe as JSON-serializable values."""
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


def preset_bits(name: str, argument: str = "recipe") -> tuple[int, int, bool]:
    """Returns the bits of weights and inputs that a preset names, and whether of every layer.

    Raises:
        ValueError: if it is no preset, or leaves both sides at 16 bits; it names the argument.
    """
    match = PRESET.fullmatch(name)
    if match is None:
        more = ", or the path of a recipe.json" if argument == "recipe" else ""
        raise ValueError(
            f"{argument}={name!r} is no preset; use w<bits>a<bits> such as w8a8, w6a8 or w4a8 "
            f"(bits 2 to 8, or 16 to leave a side as it is; w4a8-all for every layer){more}."
        )
    if match[1] == match[2] == "16":
        raise ValueError(
            f"{argument}={name!r} quantizes nothing: 16 bits leave a side as it is; give one of "
            "both fewer, such as w4a8 or w16a8."
        )
    return int(match[1]), int(match[2]), match[3] is not None


def read(path: PathLike) -> dict[str, Any]:
    try:
        data = read_once(as_path(path).read_text())
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
        check_pattern("layers", pattern)
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
    return layers_of(flatten_dict(params, sep="/"))


def operand_paths(params: Any) -> list[str]:
    """Returns the paths of the attention products' operands, such as `blocks_0/attn/operands/q`.

    Empty for parameters that no family claims.
    """
    family = family_of_params(params)
    return [] if family is None else family.operands(layer_paths(params))


def operand_names(operands: Sequence[str], layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns the names that a rule may call each operand by: `attn/operands/q`, and `attn/q` where
    that is no layer."""
    short = {path: path.replace(OPERANDS_OF, "/") for path in operands}
    return {path: (path,) if name in layers else (path, name) for path, name in short.items()}


def part_names() -> list[str]:
    """Returns the names of all parts of all families."""
    return list(dict.fromkeys(name for row in FAMILIES.values() for name in row.part_names))


def part_pattern(part: str, params: Any) -> str:
    """Returns the pattern of a part of the family that `params` are of.

    Raises:
        ValueError: if no family claims them, or theirs has no such part.
    """
    return family_claiming(params).part_pattern(part)


def family_claiming(params: Any) -> Family:
    """Returns the family of parameters; raises `ValueError` if no row claims them."""
    family = family_of_params(params)
    if family is None:
        raise ValueError(
            f"these parameters {NO_FAMILY} (layers are named like "
            f"{', '.join(layer_paths(params)[:2])}); say which layers to quantize with layers=, a "
            "regular expression of whole paths."
        )
    return family


def table_paths(params: Any) -> list[str]:
    """Returns the paths of the label tables, such as `y_embedder`."""
    flat = flatten_dict(params, sep="/")
    return [path.removesuffix(TABLE) for path in flat if path.endswith(TABLE)]
