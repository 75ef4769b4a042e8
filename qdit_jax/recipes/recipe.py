"""Recipes: which layer of a network is quantized, and to what.

A recipe is a list of rules; a rule's pattern is a regular expression that must match a whole layer
path (`blocks_3/mlp/fc1`), and the last rule that matches a layer decides. A layer's own name is a
pattern as well, so that uniform presets and per-layer assignments are the same thing.

The operands of the attention products have names too: `blocks_3/attn/operands/q` (also `k`, `v` and
`softmax`), in short `blocks_3/attn/q`. A rule that matches a layer or a label table applies to those
alone: `.*` or `blocks_3/.*` leaves the operands as they are. A rule that matches operands only
quantizes them; it has an act spec and no weight spec. A rule without any spec leaves all that it
matches in full precision, operands included.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Unpack, runtime_checkable

from qdit_jax.files import PathLike
from qdit_jax.models import FAMILIES, Family, family_of_params
from qdit_jax.recipes import stored
from qdit_jax.recipes.names import (
    NO_FAMILY,
    family_claiming,
    layer_paths,
    operand_names,
    operand_paths,
    part_names,
    table_paths,
)
from qdit_jax.recipes.over_time import OverTime
from qdit_jax.recipes.presets import (
    PresetSettings,
    fast_settings,
    preset_bits,
    preset_spec,
    with_own_settings,
)
from qdit_jax.recipes.rules import PART, LayerSpec, Rule
from qdit_jax.types import Params

# The least value of the tanh form of GELU is -0.17004.
GELU_SHIFT = 0.1701
EVERY_LAYER = ".*"


@runtime_checkable
class HasParams(Protocol):
    """What holds a parameter tree, as a `Checkpoint` does."""

    @property
    def params(self) -> Params: ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules for a whole network; `name` says what it is in reports.

    `family` is the name of the family that the rules were bound to, if any; `over_time` gives the
    quantized activations other bits at some timesteps.
    """

    rules: tuple[Rule, ...]
    name: str = "custom"
    family: str | None = dataclasses.field(default=None, compare=False, repr=False)
    over_time: OverTime | None = None

    def get(self, *names: str) -> LayerSpec | None:
        """Returns the spec of the last rule that matches a layer's name, or None to leave it."""
        for rule in reversed(self.rules):
            if any(rule.matches(name) for name in names):
                return None if rule.spec == LayerSpec() else rule.spec
        return None

    def bound(self, params: Params) -> Recipe:
        """Returns the recipe with `part:` rules as patterns of the family that `params` belong to.

        Raises:
            ValueError: if there are such rules and no family claims the parameters.
        """
        if not any(rule.layers.startswith(PART) for rule in self.rules):
            return self
        return self.bound_to(family_claiming(params))

    def within(self, params: Params) -> Recipe | None:
        """Returns the rules that match something of `params`, a part of a network; None if none do.

        Raises:
            ValueError: as `bound`.
        """
        self = self.bound(params)
        layers = layer_paths(params)
        operands = operand_names(operand_paths(params), layers)
        names = [
            *layers,
            *table_paths(params),
            *(n for called in operands.values() for n in called),
        ]
        kept = tuple(rule for rule in self.rules if any(map(rule.matches, names)))
        if all(rule.spec == LayerSpec() for rule in kept):
            return None
        return dataclasses.replace(self, rules=kept)

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

    def resolve(self, params: Params) -> dict[str, LayerSpec]:
        """Returns the spec of every layer and operand of `params` that is quantized, by path.

        A label table, such as `y_embedder`, has no input: of a rule that matches it only the
        weights' settings apply. An operand of the attention products has no coordinates to change.

        Raises:
            ValueError: if a rule matches no layer, asks for weights where there are none, or the
                rules quantize nothing.
        """
        self = self.bound(params)
        layers, tables = layer_paths(params), table_paths(params)
        names = operand_names(operand_paths(params), layers)
        broad = [self.applies_to_layers(rule, [*layers, *tables], names) for rule in self.rules]
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

    def applies_to_layers(
        self, rule: Rule, layers: Sequence[str], operands: Mapping[str, Sequence[str]]
    ) -> bool:
        """Returns whether a rule matches a layer or table, so that it does not apply to operands.

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
        if rule.spec.weight is not None or rule.spec.asks_for:
            raise ValueError(
                f"recipe {self.name!r}: {matched} is an operand of the attention products and has "
                "no weights; give it an act spec only."
            )
        return False

    def operand_spec(self, names: Sequence[str], broad: Sequence[bool]) -> LayerSpec | None:
        """Returns the spec of an attention operand; `broad` says which rules match layers."""
        for rule, applies_to_layers in zip(reversed(self.rules), reversed(broad), strict=True):
            leaves = rule.spec == LayerSpec()
            if any(map(rule.matches, names)) and (leaves or not applies_to_layers):
                return None if leaves else rule.spec.plain
        return None

    def operands_left(self, params: Params) -> list[str]:
        """Returns the attention operands that a rule matches but leaves in full precision.

        Its pattern, such as `.*`, matches layers too, and so applies to those alone.
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
        params: HasParams | Params | None = None,
        *,
        layers: str | None = None,
        **settings: Unpack[PresetSettings],
    ) -> Recipe:
        """Returns the uniform recipe `"w<bits>a<bits>"` for the linear layers of every block.

        Args:
            name: such as `"w4a8"`, or one of `NAMED`; 16 bits leave that side as it is. `"w4a8-fast"` makes each product
                one int8 dot: two levels of scales in groups of 32, inputs symmetric per token
                (`"w8a8-fast"`: weights symmetric per channel). `"w4a8-all"` quantizes every layer and label
                table, the attention operands excepted.
            params: a `Checkpoint` or a parameter tree, which the recipe is bound to and checked
                against. Without it the rule is `part:blocks`, bound to a family when it is used.
            layers: the pattern of the layers to quantize; by default the part `"blocks"` of the
                family. Parameters that no family claims need it.
            group_size: input channels that share a scale (128); 0 is the whole channel.
            symmetric: no zero points (False).
            act_symmetric: no zero points of the activations; as `symmetric` when None.
            act_group_size: the activations' group size; the weights' when None.
            act_mode: `"dynamic"`, or `"static"` (needs calibration statistics).
            per_timestep: static activations have one range per calibrated timestep.
            range_fn, act_range_fn: of the weights and of the activations (`ranges.minmax`).
            scale_dtype: of the weights' scales, 16 bits each as the paper counts them.
            scale_levels: of the weights' scales, 1 or 2, see `WeightSpec` (1).
            weight_format: a number format of `quant.formats` for the weights in place of integers,
                such as `"nf4"` for `"w4a8"`; it may fix the group size.
            act_format: the same for the activations, such as `"fp8_e4m3"` for `"w8a8"`.

        Raises:
            ValueError: if the name is not a preset or leaves everything at 16 bits, or the pattern
                cannot be read, matches no layer, or accompanies `-all`.
        """
        preset, settings = preset_bits(name), with_own_settings(name, settings)
        if preset.is_fast:
            settings = fast_settings(name, preset.weight_bits, settings)
        if preset.takes_all and layers is not None:
            raise ValueError(
                f"layers={layers!r} does not go with recipe={name!r}: give one of both."
            )
        if layers is None:
            layers = EVERY_LAYER if preset.takes_all else f"{PART}blocks"
        spec = preset_spec(preset.weight_bits, preset.act_bits, **settings)
        has_blocks = spec.weight is not None and spec.weight.fmt and spec.weight.fmt.block_size
        size = "" if has_blocks else f"-g{settings.get('group_size', 128)}"
        recipe = cls((Rule(layers, spec),), name + size)
        if params is not None:
            params = params.params if isinstance(params, HasParams) else params
            family = family_of_params(params)
            recipe = recipe.bound(params) if family is None else recipe.bound_to(family)
            recipe.resolve(params)
        return recipe

    def with_part(self, part: str, name: str, **options: Unpack[PresetSettings]) -> Recipe:
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
            options["act_group_size"] = 0
            if preset_bits(name, part).weight_bits != 16:
                raise ValueError(
                    f"{part}={name!r}: attention operands have no weights; use 'w16a8' or the like."
                )
        if preset_bits(name, part).takes_all:
            raise ValueError(f"{part}={name!r}: -all belongs to a whole recipe; leave it out here.")
        added = Recipe.preset(name, layers=PART + part, **options)
        name = f"{self.name}-{part}-{name}"
        recipe = dataclasses.replace(self, rules=(*self.rules, *added.rules), name=name)
        return recipe if self.family is None else recipe.bound_to(FAMILIES[self.family])

    def with_shifted_gelu(self, params: Params) -> Recipe:
        """Returns the recipe with unsigned symmetric codes for inputs that come from a GELU.

        `GELU_SHIFT` is added before quantizing and subtracted afterwards, so that no value is
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
                dataclasses.replace(
                    spec,
                    act=dataclasses.replace(
                        spec.act, symmetric=True, unsigned=True, shift=GELU_SHIFT
                    ),
                ),
            )
            for path, spec in self.resolve(params).items()
            if re.fullmatch(family.gelu_inputs, path)
            and spec.act is not None
            and spec.act.fmt is None
        ]
        return dataclasses.replace(self, rules=(*self.rules, *added), name=f"{self.name}-gelu")

    def for_rounding(self) -> Recipe:
        """Returns the recipe without transforms and ranks: for parameters that have them already."""
        rules = tuple(dataclasses.replace(r, spec=r.spec.plain) for r in self.rules)
        return dataclasses.replace(self, rules=rules)

    def to_json(self) -> dict[str, Any]:
        """Returns the recipe as JSON-serializable values."""
        return stored.to_json(self.rules, self.name, self.over_time)

    @classmethod
    def from_json(cls, source: PathLike | dict[str, Any]) -> Recipe:
        """Returns the recipe in a JSON file, or in values that `to_json` returned.

        Raises:
            ValueError: if the file is absent or no recipe, or a setting is unknown.
        """
        rules, name, over_time = stored.from_json(source)
        return cls(rules, name, over_time=over_time)
