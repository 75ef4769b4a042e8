"""What one tensor is quantized to: frozen, hashable, JSON-serializable settings."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

import numpy as np

from qdit_jax.quant import formats, levels, ranges

MODES = ("dynamic", "static")
SCALE_DTYPES = ("float32", "float16", "bfloat16")


def _check_bits(bits: object) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in range(2, 9):
        raise ValueError(
            f"bits={bits!r} is not supported; use 2 to 8, or 16 to leave the layer as it is."
        )


def _check_group_size(group_size: object) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 0:
        raise ValueError(
            f"group_size={group_size!r} is not supported; use a positive number of input "
            "channels, or 0 for the whole channel."
        )


def _adopt_whole_numbers(spec: WeightSpec | ActSpec) -> None:
    """Turns NumPy integers, which searches produce, into Python's, for hashing and JSON."""
    for name in ("bits", "group_size"):
        value = getattr(spec, name)
        if isinstance(value, np.integer):
            object.__setattr__(spec, name, int(value))


def _check_range_fn(range_fn: object) -> None:
    if not isinstance(range_fn, ranges.RangeRule):
        raise TypeError(
            f"range_fn={range_fn!r} is not a range rule; use one of qdit_jax.quant.ranges, "
            "such as ranges.minmax or ranges.mse()."
        )


def _check_scale_levels(spec: WeightSpec) -> None:
    if spec.scale_levels not in (1, 2):
        raise ValueError(f"scale_levels={spec.scale_levels!r} is not supported; use 1 or 2.")
    if spec.scale_levels == 1:
        return
    if spec.fmt is not None:
        raise ValueError(
            f"scale_levels=2 is for integers, not for the format {spec.fmt.name!r}; use 1."
        )
    if spec.bits not in levels.BITS:
        raise ValueError(
            f"scale_levels=2 with bits={spec.bits} is not supported: levels have 8 bits; use 2 to 6 "
            "bits, or scale_levels=1 with group_size=0."
        )


def _adopt_format(spec: WeightSpec | ActSpec) -> None:
    """Sets the fields of `spec` that its number format fixes."""
    if spec.fmt is None:
        return
    object.__setattr__(spec, "bits", spec.fmt.bits)
    object.__setattr__(spec, "symmetric", True)
    if spec.fmt.block_size:
        object.__setattr__(spec, "group_size", spec.fmt.block_size)


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """How a kernel `[K, N]` is quantized.

    Attributes:
        bits: bits per code, 2 to 8.
        group_size: input channels that share a scale; 0 is the whole channel.
        symmetric: signed codes without a zero point.
        range_fn: a rule of `qdit_jax.quant.ranges`.
        scale_dtype: dtype of the stored scales. Codes are computed with the stored scale.
        channel_group: neighboring output channels that share a scale.
        fmt: a number format of `qdit_jax.quant.formats` in place of integers; it then fixes
            `bits`, `symmetric` and, if it has blocks, `group_size`.
        scale_levels: 2 stores integers of 2 to 6 bits with a scale per output channel, float32, and
            whole numbers of one byte per group, see `qdit_jax.quant.levels`: a product is then one
            int8 dot over all of K. `scale_dtype` has no effect there.
    """

    # Any: `__post_init__` refuses wrong types with a remedy, and takes NumPy integers.
    bits: Any = 4
    group_size: Any = 128
    symmetric: bool = False
    range_fn: Any = ranges.minmax
    scale_dtype: str = "float32"
    channel_group: int = 1
    fmt: formats.Format | None = None
    scale_levels: int = 1

    def __post_init__(self) -> None:
        _adopt_format(self)
        _adopt_whole_numbers(self)
        _check_bits(self.bits)
        _check_group_size(self.group_size)
        _check_range_fn(self.range_fn)
        _check_scale_levels(self)
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"scale_dtype={self.scale_dtype!r} is not supported; use one of "
                f"{', '.join(SCALE_DTYPES)}."
            )
        if self.channel_group < 1:
            raise ValueError(f"channel_group={self.channel_group} must be 1 or more.")
        if self.fmt is not None and self.channel_group != 1:
            raise ValueError(
                f"format {self.fmt.name!r} has a scale per channel; use channel_group=1."
            )

    @property
    def has_levels(self) -> bool:
        """Whether there are two levels of scales, so that a product's operand is int8 levels."""
        return self.scale_levels == 2 or (self.fmt is not None and self.fmt.has_codebook)

    @property
    def product_group_size(self) -> int:
        """Input channels inside which a product has one scale; 0 is all."""
        return 0 if self.has_levels else int(self.group_size)

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as JSON-serializable values."""
        return _to_json(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WeightSpec:
        """Returns the spec that `to_json` described; absent settings keep their defaults.

        Raises:
            ValueError: if a setting, range rule or format is unknown.
        """
        return _from_json(cls, data)


@dataclasses.dataclass(frozen=True)
class ActSpec:
    """How the input `[..., K]` of a linear layer is quantized.

    Attributes:
        bits: bits per code, 2 to 8.
        group_size: channels of one token that share a scale; 0 is the whole token (dynamic)
            or the whole tensor (static). Of a static number format with a factor per tensor (NVFP4),
            the factor alone is calibrated.
        symmetric: no zero point.
        range_fn: a rule of `qdit_jax.quant.ranges`.
        mode: "dynamic" computes scales from the current values, "static" uses calibrated ones.
        per_timestep: a static range for every calibrated timestep in place of one for all.
        unsigned: with `symmetric`, codes `[0, 2**bits - 1]` for values that are never negative.
        shift: constant added before quantizing and subtracted afterwards; 0.1701 makes the
            output of a tanh GELU non-negative.
        fmt: a number format of `qdit_jax.quant.formats` in place of integers; it then fixes
            `bits`, `symmetric` and, if it has blocks, `group_size`.
    """

    # Any: as in `WeightSpec`.
    bits: Any = 8
    group_size: Any = 128
    symmetric: bool = False
    range_fn: Any = ranges.minmax
    mode: Literal["dynamic", "static"] = "dynamic"
    unsigned: bool = False
    shift: float = 0.0
    fmt: formats.Format | None = None
    per_timestep: bool = False

    def __post_init__(self) -> None:
        _adopt_format(self)
        _adopt_whole_numbers(self)
        _check_bits(self.bits)
        _check_group_size(self.group_size)
        _check_range_fn(self.range_fn)
        if self.per_timestep and self.mode != "static":
            raise ValueError("per_timestep=True needs mode='static'; dynamic ranges are current.")
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not supported; use 'dynamic' or 'static'.")
        if self.unsigned and not self.symmetric:
            raise ValueError("unsigned=True needs symmetric=True; asymmetric codes are unsigned.")
        if self.fmt is not None and (self.unsigned or self.shift):
            raise ValueError(
                f"format {self.fmt.name!r} is signed and unshifted only; leave unsigned and shift at "
                "their defaults."
            )
        if self.fmt is not None and self.mode == "static" and not self.fmt.has_calibrated_scale:
            raise ValueError(
                f"format {self.fmt.name!r} has powers of two as scales, which nobody calibrates; use "
                "mode='dynamic'."
            )
        if self.fmt is not None and self.mode == "static" and isinstance(self.range_fn, ranges.Mse):
            raise ValueError(
                f"range rule {self.range_fn.name!r} measures integer codes, not those of the format "
                f"{self.fmt.name!r}; use ranges.minmax or ranges.percentile()."
            )
        if self.fmt is not None and self.fmt.has_codebook:
            raise ValueError(
                f"format {self.fmt.name!r} learns a table per kernel, which inputs have not; use "
                "bits=8 or a format such as fp8_e4m3."
            )

    @property
    def static_group_size(self) -> int:
        """Input channels that share one calibrated scale; 0 is all."""
        return 0 if self.fmt is not None and self.fmt.has_tensor_scale else int(self.group_size)

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as JSON-serializable values."""
        return _to_json(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ActSpec:
        """Returns the spec that `to_json` described; absent settings keep their defaults.

        Raises:
            ValueError: if a setting, range rule or format is unknown.
        """
        return _from_json(cls, data)


Spec = TypeVar("Spec", WeightSpec, ActSpec)


def _to_json(spec: WeightSpec | ActSpec) -> dict[str, Any]:
    data = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    data["range_fn"] = spec.range_fn.to_json()
    data["fmt"] = None if spec.fmt is None else spec.fmt.name
    if data.get("scale_levels") == 1:
        del data["scale_levels"]  # so that earlier releases read what they can compute
    return data


def _from_json(cls: type[Spec], data: dict[str, Any]) -> Spec:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(
            f"unknown setting {unknown[0]!r} of {cls.__name__}; known: {', '.join(sorted(known))}."
        )
    settings = dict(data)
    if "range_fn" in settings:
        settings["range_fn"] = ranges.from_json(settings["range_fn"])
    if isinstance(settings.get("fmt"), str):
        settings["fmt"] = formats.by_name(settings["fmt"])
    return cls(**settings)
