"""What is timed side by side: a network in full precision, and quantized in several ways."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from qdit_jax.checkpoint import (
    Checkpoint,
    default_dtype,
    digest,
    dtype_of,
    with_dtype,
    with_expanded_weights,
)
from qdit_jax.errors import UserError
from qdit_jax.kernels import (
    IMPLEMENTATIONS,
    NUMERICS,
    implementation_of,
    layer_numerics,
    quantized_layers,
    unsupported_reason,
)
from qdit_jax.models import DTYPES, rows_per_sample
from qdit_jax.ptq import plan, quantize_params
from qdit_jax.quant import ActQuant, ActSpec, QTensor, WeightSpec
from qdit_jax.recipes import Recipe
from qdit_jax.sampling import check_whole, on_one_device
from qdit_jax.types import Params

# XLA's products in the order that suits CPUs: `xla` beside them would be the same ones, compiled once more.
REORDERED = frozenset({"xla_cpu"})
GROUPED = re.compile(r"(.+)-g(\d+)")


@dataclasses.dataclass(frozen=True)
class Way:
    """How a network's quantized products are computed; both None in full precision.

    Attributes:
        numerics: one of `NUMERICS`.
        implementation: a name in the table of kernels, which computes all of them; None takes the
            first that fits each.
    """

    numerics: str | None = None
    implementation: str | None = None


class QuantizedLayer(NamedTuple):
    """A layer with packed weights: its path, input channels, and both operands or their specs."""

    path: str
    channels: int
    weight: QTensor | WeightSpec
    act: ActQuant | ActSpec | None


@dataclasses.dataclass(frozen=True, eq=False)
class Contender:
    """A network whose parameters are made when they are needed.

    Attributes:
        title: what people call it, such as `w4a8-g128`.
        checkpoint: its network, and what `make_fn` starts from.
        layers: what its quantized products multiply; empty in full precision.
        rows: of a layer per network input, by path.
        make_fn: returns the parameters.
    """

    title: str
    checkpoint: Checkpoint
    layers: tuple[QuantizedLayer, ...]
    rows: Mapping[str, int]
    make_fn: Callable[[], Params]

    def implementations(self, way: Way, batch: int) -> dict[str, int]:
        """Returns how many layers each implementation computes; `batch` counts network inputs."""
        if way.implementation is not None:
            return {way.implementation: len(self.layers)}
        found: Counter[str] = Counter()
        dtype = dtype_of(self.checkpoint)
        for layer in self.layers:
            product, numerics = self.product(layer, batch), self.numerics(layer, way)
            with on_one_device():
                found[implementation_of(*product, numerics, dtype=dtype)] += 1
        return dict(found)

    def numerics(self, layer: QuantizedLayer, way: Way) -> str:
        """Returns how a layer is computed, see `layer_numerics`."""
        return layer_numerics(layer.act, str(way.numerics), [one.act for one in self.layers])

    def product(
        self, layer: QuantizedLayer, batch: int
    ) -> tuple[tuple[int, int], QTensor | WeightSpec, ActQuant | ActSpec | None]:
        """Returns a layer's input shape and operands, as the table of kernels takes them."""
        # Without scales: an unpicked table would be refused, and its rows make no difference here.
        act = ActQuant(layer.act.spec) if isinstance(layer.act, ActQuant) else layer.act
        return (self.rows[layer.path] * batch, layer.channels), layer.weight, act

    def why_not(self, layer: QuantizedLayer, batch: int, way: Way) -> str | None:
        """Returns why a layer cannot be computed this way, one sentence, or None if it can."""
        product = (*self.product(layer, batch), self.numerics(layer, way), way.implementation)
        with on_one_device():
            reason = unsupported_reason(*product, dtype=dtype_of(self.checkpoint))
        return None if reason is None else f"{layer.path}: {reason}"


def contenders_of(
    checkpoint: Checkpoint,
    recipes: Iterable[Recipe],
    against: Checkpoint | None = None,
    dtype: str | None = None,
    *,
    expand: bool = False,
) -> list[Contender]:
    """Returns the network in full precision first, in each dtype, then rounded by each recipe.

    The first dtype is the platform's own, in which the quantized networks compute as well. A
    quantized checkpoint comes as it is, after `against` if that is given.

    Args:
        dtype: in place of the platform's own.
        expand: a quantized checkpoint comes once more, with its weights unpacked.

    Raises:
        UserError: if recipes are given for a quantized checkpoint, or `expand` for full precision.
        ValueError: if parameters are split over devices.
    """
    recipes, dtype = list(recipes), dtype or default_dtype()
    for one in (checkpoint, *([] if against is None else [against])):
        check_whole(one.params, "bench")
    rows = rows_per_sample(checkpoint.model)
    if checkpoint.recipe is None:
        if against is not None:
            raise UserError(
                "against: the checkpoint is in full precision itself; leave it out, or bench a "
                "quantized checkpoint."
            )
        if expand:
            raise UserError("expand: only the weights of a quantized checkpoint can be unpacked.")
        own = with_dtype(checkpoint, dtype)
        return [
            *in_full_precision(checkpoint, dtype, rows),
            *(rounded(own, recipe, rows) for recipe in recipes),
        ]
    if recipes:
        raise UserError(
            f"the checkpoint is quantized already ({checkpoint.recipe.name}) and is benched as it "
            f"is; leave recipes={recipes[0].name} out, or give the full-precision checkpoint."
        )
    ours = [as_it_is(checkpoint.recipe.name, with_dtype(checkpoint, dtype), rows)]
    if expand:
        other = with_expanded_weights(with_dtype(checkpoint, dtype))
        ours.append(as_it_is(f"{checkpoint.recipe.name}, expanded", other, rows))
    if against is None:
        return ours
    if against.recipe is not None or type(against.model) is not type(checkpoint.model):
        raise UserError(
            "against: not the full-precision checkpoint of the same network; give the one that the "
            "checkpoint was made from."
        )
    return [*in_full_precision(against, dtype, rows), *ours]


def in_full_precision(checkpoint: Checkpoint, own: str, rows: Mapping[str, int]) -> list[Contender]:
    """Returns the network in each dtype that it can compute in, `own` first."""
    others = [dtype for dtype in DTYPES if dtype != own and hasattr(checkpoint.model, "dtype")]
    return [as_it_is(dtype, with_dtype(checkpoint, dtype), rows) for dtype in (own, *others)]


def as_it_is(title: str, checkpoint: Checkpoint, rows: Mapping[str, int]) -> Contender:
    """Returns a checkpoint's own network."""
    layers = tuple(
        QuantizedLayer(path, kernel.shape[0], kernel, act)
        for path, kernel, act in quantized_layers(checkpoint.params)
    )
    return Contender(title, checkpoint, layers, rows, lambda: checkpoint.params)


def rounded(checkpoint: Checkpoint, recipe: Recipe, rows: Mapping[str, int]) -> Contender:
    """Returns a network rounded to nearest; raises `ValueError` if the recipe does not fit it."""
    specs = recipe.resolve(checkpoint.params)
    layers = tuple(
        QuantizedLayer(layer.path, layer.shape[0], layer.spec.weight, specs[layer.path].act)
        for layer in plan(checkpoint.params, recipe)
        if layer.spec.weight is not None and layer.path in rows  # not a label table
    )
    return Contender(
        title_of(recipe),
        checkpoint,
        layers,
        rows,
        lambda: quantize_params(checkpoint.params, recipe=recipe),
    )


def title_of(recipe: Recipe) -> str:
    """Returns a recipe's name, with a digest unless it is a preset's: others may share their name."""
    if GROUPED.fullmatch(recipe.name) and recipe == recipe_named(recipe.name):
        return recipe.name
    return f"{recipe.name} ({digest(recipe.to_json())[:6]})"


def ways_of(
    contender: Contender, numerics: Sequence[str], implementations: Sequence[str], batch: int
) -> list[Way]:
    """Returns the ways in which a network can be computed: one, without any, in full precision.

    For each of the numerics that fits, the implementations that the table takes, then every other one
    that can compute all layers. `implementations` restricts them; empty is no restriction, but leaves out
    the others where the table takes `REORDERED`.

    Raises:
        UserError: if nothing fits.
    """
    if not contender.layers:
        return [Way()]
    found: dict[tuple[str, frozenset[str]], Way] = {}
    reasons = []
    for way in (Way(one, name) for one in numerics for name in (None, *IMPLEMENTATIONS)):
        if way.implementation and not implementations and (str(way.numerics), REORDERED) in found:
            continue
        given = (contender.why_not(layer, batch, way) for layer in contender.layers)
        reason = next(filter(None, given), None)
        if reason is not None:
            reasons.append(f"{way.numerics}: {reason}")
            continue
        used = frozenset(contender.implementations(way, batch))
        if not implementations or used <= {*implementations}:
            found.setdefault((str(way.numerics), used), way)
    if not found:
        reason = reasons[0] if reasons else f"not by {', '.join(implementations)} alone."
        raise UserError(f"{contender.title} cannot be computed this way: {reason}")
    return list(found.values())


def recipe_named(text: str, group_size: int | None = None) -> Recipe:
    """Returns the recipe that a preset's name such as `w4a8` or `w4a8-g32` says, or a file holds.

    Raises:
        ValueError: if it is neither.
    """
    if text.endswith(".json"):
        return Recipe.from_json(text)
    if match := GROUPED.fullmatch(text):
        text, group_size = match[1], int(match[2])
    return Recipe.preset(text) if group_size is None else Recipe.preset(text, group_size=group_size)


def check_known(numerics: Iterable[str], implementations: Iterable[str]) -> None:
    """Raises `UserError` for numerics or an implementation that is not known."""
    for word, names, known in (
        ("numerics", numerics, NUMERICS),
        ("implementation", implementations, tuple(IMPLEMENTATIONS)),
    ):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{word}={unknown[0]!r} is not known; use {' or '.join(known)}.")
