"""Range rules: which interval of values the codes of a group cover, and the scale it gives.

Every rule is a frozen dataclass. Calling one returns it with other settings:
`ranges.minmax`, `ranges.minmax(clip=0.9)`, `ranges.percentile(0.999)`, `ranges.mse(num_points=50)`.
A rule offers `limits(x, bits, symmetric, axis)`, the interval of each group, and
`scale(low, high, bits, symmetric)`, the width of one code's step on that interval.

Dimensions: G groups, S members of a group (reduced over `axis`), N the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from qdit_jax.errors import earlier_names
from qdit_jax.quant import grid_search
from qdit_jax.quant.division import quotient_by_number

Values = Float[Array, "..."]
Limits = tuple[Values, Values]


def max_code(bits: int, symmetric: bool) -> int:
    """Returns the number of steps from code 0.0 (symmetric) or the lowest code to the highest."""
    return 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1


def positive_or_one(scale: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Returns `scale` with 1 in place of 0, the scale of a group that holds zeros only; NaN stays."""
    return jnp.where(scale <= 0, jnp.ones_like(scale), scale)


def rounded_product(x: Values, factor: Values | float) -> Values:
    """Returns `x * factor`, rounded to float32 before any other operation.

    XLA:CPU contracts a product and a following difference into one fused operation, which
    rounds once instead of twice; the clip to finite numbers stands between them.
    """
    top = float(jnp.finfo(jnp.float32).max)
    return jnp.clip(x * factor, -top, top)


def extremes(x: Values, axis: int) -> Limits:
    """Returns the least and the greatest value along `axis`, which is removed."""
    return jnp.min(x, axis=axis), jnp.max(x, axis=axis)


@dataclasses.dataclass(frozen=True)
class RangeRule:
    """What the rules share; `limits_from_extremes` is all that most of them define.

    `from_extremes` says whether a group's least and greatest value determine its limits, as
    the quantizers with a traced group size and calibrated activations need.
    """

    name: ClassVar[str] = ""
    from_extremes: ClassVar[bool] = True

    def __call__(self, **settings: float | int) -> RangeRule:
        """Returns this rule with `settings` replaced."""
        known = {field.name for field in dataclasses.fields(self)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(
                f"range rule {self.name!r} has no setting {unknown[0]!r}; it has {sorted(known)}."
            )
        return dataclasses.replace(self, **settings)

    def limits_from_extremes(self, low: Values, high: Values, bits: int, symmetric: bool) -> Limits:
        """Returns the interval to cover, given a group's least and greatest value."""
        raise NotImplementedError

    def limits(self, x: Values, bits: int, symmetric: bool, axis: int) -> Limits:
        """Returns the interval to cover for every group; `axis` (the members) is removed."""
        return self.limits_from_extremes(*extremes(x, axis), bits, symmetric)

    def scale(self, low: Values, high: Values, bits: int, symmetric: bool) -> Values:
        """Returns the step of the codes on `[low, high]`; 1 where the interval is a point."""
        top = max_code(bits, symmetric)
        return positive_or_one(quotient_by_number(high if symmetric else high - low, top))

    def to_json(self) -> dict[str, Any]:
        """Returns the rule's name and settings."""
        return {"name": self.name, **dataclasses.asdict(self)}


def check_clip(clip: float) -> None:
    """Raises ValueError unless `clip` is a ratio in (0, 1]."""
    if not 0 < clip <= 1:
        raise ValueError(f"clip={clip} is not a clip ratio; use a number in (0, 1].")


@dataclasses.dataclass(frozen=True)
class MinMax(RangeRule):
    """The least and the greatest value, widened to contain 0, times `clip`."""

    name: ClassVar[str] = "minmax"
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_clip(self.clip)

    def limits_from_extremes(self, low: Values, high: Values, bits: int, symmetric: bool) -> Limits:
        """See `RangeRule`."""
        if symmetric:
            high = jnp.maximum(-low, high) * self.clip
            return -high, high
        return jnp.minimum(low, 0) * self.clip, jnp.maximum(high, 0) * self.clip


@dataclasses.dataclass(frozen=True)
class AbsMax(RangeRule):
    """From minus to plus the greatest absolute value, times `clip`, also for asymmetric codes."""

    name: ClassVar[str] = "absmax"
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_clip(self.clip)

    def limits_from_extremes(self, low: Values, high: Values, bits: int, symmetric: bool) -> Limits:
        """See `RangeRule`."""
        high = jnp.maximum(-low, high) * self.clip
        return -high, high


@dataclasses.dataclass(frozen=True)
class Percentile(RangeRule):
    """The `1 - p` and `p` quantiles (symmetric: the `p` quantile of |x|), widened to contain 0."""

    name: ClassVar[str] = "percentile"
    from_extremes: ClassVar[bool] = False
    p: float = 0.999

    def __post_init__(self) -> None:
        if not 0.5 < self.p <= 1:
            raise ValueError(f"p={self.p} is not an upper quantile; use a number in (0.5, 1].")

    def limits(self, x: Values, bits: int, symmetric: bool, axis: int) -> Limits:
        """See `RangeRule`."""
        if symmetric:
            high = jnp.quantile(jnp.abs(x), self.p, axis=axis)
            return -high, high
        low, high = jnp.quantile(x, jnp.array([1 - self.p, self.p], x.dtype), axis=axis)
        return jnp.minimum(low, 0), jnp.maximum(high, 0)


@dataclasses.dataclass(frozen=True)
class Mse(RangeRule):
    """The shrunken min-max interval whose quantized group has the least mean |error|**norm.

    `num_points` ratios are tried, from 1 down in steps of `max_shrink / num_points`; of equal
    scores the widest interval wins. 0 is always inside.
    """

    name: ClassVar[str] = "mse"
    from_extremes: ClassVar[bool] = False
    num_points: int = 50
    max_shrink: float = 0.5
    norm: float = 2.0

    def __post_init__(self) -> None:
        if self.num_points < 1:
            raise ValueError(f"num_points={self.num_points} leaves nothing to try; use 1 or more.")
        if not 0 < self.max_shrink < 1:
            raise ValueError(f"max_shrink={self.max_shrink} must lie strictly between 0 and 1.")
        if self.norm <= 0:
            raise ValueError(f"norm={self.norm} must be positive.")

    def widest(self) -> RangeRule:
        """Returns the rule whose interval is shrunk."""
        return MinMax()

    def limits(self, x: Values, bits: int, symmetric: bool, axis: int) -> Limits:
        """See `RangeRule`."""
        low, high = self.widest().limits(x, bits, symmetric, axis)
        members = jnp.moveaxis(x, axis, -2)
        ratio = grid_search.best_ratio(members, low, high, self, bits=bits, symmetric=symmetric)
        return rounded_product(low, ratio), rounded_product(high, ratio)


@dataclasses.dataclass(frozen=True)
class QDiTRelease(RangeRule):
    """The min-max rule of the Q-DiT release, to the bit.

    The interval is not widened to contain 0, the scale has a floor, and the zero point is
    clamped: a group that lies in [5, 6] comes back as about 1.0. Kept for comparison.
    Source: Q-DiT (arXiv:2406.17343), the released quantizer's "max" method.
    """

    name: ClassVar[str] = "qdit_release"
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_clip(self.clip)

    def limits_from_extremes(self, low: Values, high: Values, bits: int, symmetric: bool) -> Limits:
        """See `RangeRule`."""
        if symmetric:
            high = jnp.maximum(jnp.maximum(-low, high), 1e-5) * self.clip
            return -high, high
        return rounded_product(low, self.clip), rounded_product(high, self.clip)

    def scale(self, low: Values, high: Values, bits: int, symmetric: bool) -> Values:
        """See `RangeRule`; the interval is at least 1e-5 wide."""
        top = max_code(bits, symmetric)
        return quotient_by_number(high if symmetric else jnp.maximum(high - low, 1e-5), top)


@dataclasses.dataclass(frozen=True)
class QDiTReleaseMse(Mse):
    """The "mse" method of the Q-DiT release: 100 ratios from 1 to 0.901, mean |error|**2.4."""

    name: ClassVar[str] = "qdit_release_mse"
    num_points: int = 100
    max_shrink: float = 0.1
    norm: float = 2.4

    def widest(self) -> RangeRule:
        """See `Mse`."""
        return QDiTRelease()

    def scale(self, low: Values, high: Values, bits: int, symmetric: bool) -> Values:
        """See `QDiTRelease`."""
        return QDiTRelease().scale(low, high, bits, symmetric)


@dataclasses.dataclass(frozen=True)
class QDiTReleaseGptq(RangeRule):
    """The grid of the release's GPTQ, with its floor for empty groups and its symmetric scale.

    0 is inside the interval; an all-zero group covers [-1, 1]; a symmetric group spans
    `[-absmax, absmax]` with `2**bits - 1` steps, and a group without negative values
    `[0, max]`, whose upper half the codes then cannot reach.
    """

    name: ClassVar[str] = "qdit_release_gptq"
    clip: float = 1.0

    def __post_init__(self) -> None:
        check_clip(self.clip)

    def limits_from_extremes(self, low: Values, high: Values, bits: int, symmetric: bool) -> Limits:
        """See `RangeRule`; the clip ratio enters the scale only, as in the release."""
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
        if symmetric:
            high = jnp.maximum(-low, high)
            low = jnp.where(low < 0, -high, low)
        empty = (low == 0) & (high == 0)
        return jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)

    def scale(self, low: Values, high: Values, bits: int, symmetric: bool) -> Values:
        """See `RangeRule`."""
        return quotient_by_number((high - low) * self.clip, 2**bits - 1)


minmax = MinMax()
absmax = AbsMax()
qdit_release = QDiTRelease()
qdit_release_mse = QDiTReleaseMse()
qdit_release_gptq = QDiTReleaseGptq()


def percentile(p: float = 0.999) -> Percentile:
    """Returns the rule that covers the `1 - p` to `p` quantiles of each group."""
    return Percentile(p=p)


def mse(num_points: int = 50, max_shrink: float = 0.5, norm: float = 2.0) -> Mse:
    """Returns the rule that shrinks each group's min-max interval to the least mean |error|**norm."""
    return Mse(num_points=num_points, max_shrink=max_shrink, norm=norm)


_RULES = {
    rule.name: rule
    for rule in (MinMax, AbsMax, Percentile, Mse, QDiTRelease, QDiTReleaseMse, QDiTReleaseGptq)
}

# Names of rules in recipes, and in this module, of earlier versions.
_EARLIER = {
    "authors": "qdit_release",
    "authors_mse": "qdit_release_mse",
    "authors_gptq": "qdit_release_gptq",
}
__getattr__ = earlier_names(__name__, _EARLIER)


def from_json(data: str | dict[str, Any]) -> RangeRule:
    """Returns the rule that `RangeRule.to_json` (or a bare name) describes.

    Raises:
        ValueError: if the name or a setting is unknown; the message lists the known ones.
    """
    settings = {"name": data} if isinstance(data, str) else dict(data)
    name = settings.pop("name", None)
    name = _EARLIER.get(str(name), name)
    if name not in _RULES:
        raise ValueError(f"unknown range rule {name!r}; known rules: {', '.join(sorted(_RULES))}.")
    return _RULES[name]()(**settings)
