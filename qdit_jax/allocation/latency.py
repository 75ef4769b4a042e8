"""Measured times of layers as a cost: read from the file that `qdit bench --table` writes.

Dimensions: K input channels, N output channels, R rows of a layer's input in one step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import jax

from qdit_jax.allocation.choice_options import choice_options
from qdit_jax.allocation.extra_work import run_time_spec
from qdit_jax.allocation.space import SearchLayer, Space
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike, as_path, read_once
from qdit_jax.quant import ActSpec, WeightSpec
from qdit_jax.recipes import LayerSpec

FORMAT_VERSION = 1
# What a side's name says, or what makes no difference to the time of a product.
NAMED = {"bits", "group_size", "fmt"}
OF_VALUES = {"weight": {"range_fn"}, "act": set[str]()}


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """The time of one layer's product in one format.

    Attributes:
        channels, width, rows: K, N and R.
        choice: what `choice_name` says.
        ms: median milliseconds, with the ends of its 95 % interval.
        call_ms: of a call that computes nothing, in the same rounds; a step of the network has no
            such calls, so it is subtracted.
        implementation: who computed it; None in full precision.
    """

    channels: int
    width: int
    rows: int
    choice: str
    ms: float
    low: float
    high: float
    call_ms: float
    implementation: str | None = None

    @property
    def key(self) -> tuple[int, int, int, str]:
        """What the time is looked up by."""
        return self.channels, self.width, self.rows, self.choice

    @property
    def own_ms(self) -> float:
        """Milliseconds without those of a call."""
        return max(self.ms - self.call_ms, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Latency:
    """A cost function: the measured milliseconds of a layer in one step of the sampler.

    Attributes:
        batch: samples of a step.
        inputs: network inputs of a step: `batch`, or guided twice as many.
        numerics: what was computed.
        step_ms: of a whole step in full precision.
        layers: the times.
        provenance: date, versions and device.
        source: what messages call it.
    """

    batch: int
    inputs: int
    numerics: str
    step_ms: float
    layers: tuple[LayerTime, ...]
    provenance: Mapping[str, str]
    source: str = "the latency table"

    def __post_init__(self) -> None:
        if len(self.by_key) < len(self.layers):
            keys = [layer.key for layer in self.layers]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{self.source} holds {twice} twice; measure it again.")

    @cached_property
    def by_key(self) -> dict[tuple[int, int, int, str], LayerTime]:
        """The times by what they are looked up by."""
        return {layer.key: layer for layer in self.layers}

    def __call__(self, layer: SearchLayer, spec: LayerSpec) -> float:
        """Returns the milliseconds of a layer in a step, on average over the steps.

        Raises:
            UserError: if they were not measured.
        """
        return self.time_of(layer, spec, (spec, *layer.choices)).own_ms * layer.share

    def time_of(
        self, layer: SearchLayer, spec: LayerSpec, choices: Iterable[LayerSpec]
    ) -> LayerTime:
        """Returns the time of a choice; `choices` are those that a new table should have.

        Raises:
            UserError: if it was not measured; the message has the command that measures `choices`.
        """
        k, n = layer.shape
        rows, name = layer.rows * self.inputs, timed_name(layer, spec)
        if (k, n, rows, name) in self.by_key:
            return self.by_key[k, n, rows, name]
        shapes = {key[:3] for key in self.by_key}
        unknown = "" if (k, n, rows) in shapes else " with the --layers and --embeds of the search"
        raise UserError(
            f"{self.source} has no time for K={k} N={n} rows={rows} {name}, of {layer.path}; "
            f"measure it: {self.command(choices)}{unknown}"
        )

    def check(self, space: Space) -> None:
        """Raises `UserError` unless every choice of a space was measured.

        The message has the command that measures all of them, where a call's has a layer's own.
        """
        choices = tuple(spec for layer in space.layers for spec in layer.choices)
        for layer in space.layers:
            for spec in layer.choices:
                self.time_of(layer, spec, choices)

    def command(self, choices: Iterable[LayerSpec]) -> str:
        """Returns the command that measures choices."""
        return (
            f"qdit bench CKPT OUT --table --batch {self.batch} --numerics {self.numerics} "
            f"{choice_options(choices)}"
        )

    def remainder(self, space: Space) -> float:
        """Returns the milliseconds of a step that no choice changes: all but the space's layers."""
        return self.step_ms - sum(self(layer, LayerSpec()) for layer in space.layers)

    def device_note(self) -> str | None:
        """Returns a sentence if this machine has another device than the one measured on."""
        measured, here = self.provenance["device"].partition(" x ")[2], this_device()
        if measured == here:
            return None
        return (
            f"{self.source} was measured on {measured} and this machine has {here}: what is found "
            "is fast there, not here"
        )

    def facts(self, space: Space) -> dict[str, Any]:
        """Returns what a search records of it, in JSON's types."""
        return {
            "source": self.source,
            "batch": self.batch,
            "numerics": self.numerics,
            "step_ms": self.step_ms,
            "remainder_ms": self.remainder(space),
            "provenance": dict(self.provenance),
        }

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the source in JSON's types."""
        entries = dataclasses.asdict(self)
        entries.pop("source")
        return {"latency_version": FORMAT_VERSION, **entries}

    @classmethod
    def read(cls, path: PathLike) -> Latency:
        """Returns the table in a file.

        Raises:
            UserError: if it is absent, not such a table, or a time is not a number.
        """
        path = as_path(path)
        try:
            return cls.from_json(read_once(path.read_text()), path.name)
        except FileNotFoundError:
            raise UserError(
                f"{path} does not exist; `qdit bench CKPT OUT --table` writes one."
            ) from None
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is not readable JSON: {error}.") from error

    @classmethod
    def from_json(cls, data: object, source: str) -> Latency:
        """Returns what `to_json` described.

        Raises:
            UserError: if `data` are something else, or a time is not a number of 0 or more.
        """
        if not isinstance(data, dict) or "latency_version" not in data:
            raise UserError(
                f"{source} is not a latency table; give the latency.json of `qdit bench --table`."
            )
        if data["latency_version"] != FORMAT_VERSION:
            raise UserError(
                f"{source}: latency_version={data['latency_version']}; this release reads version "
                f"{FORMAT_VERSION}."
            )
        try:
            rest = {k: v for k, v in data.items() if k not in ("latency_version", "layers")}
            layers = tuple(LayerTime(**entry) for entry in data["layers"])
            found = cls(**rest, layers=layers, source=source)
            numbers = [found.step_ms, *(ms for layer in layers for ms in (layer.ms, layer.call_ms))]
            wrong = [ms for ms in numbers if not (math.isfinite(ms) and ms >= 0)]
            found.provenance["device"]
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{source} is not a whole latency table: {error}.") from error
        if wrong:
            raise UserError(
                f"{source} holds a time of {wrong[0]} ms; times are numbers of 0 or more: measure "
                "it again."
            )
        return found


def this_device() -> str:
    """Returns the kind of this machine's device as `report.provenance` writes it."""
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind}, {platform.machine()})"


def timed_name(layer: SearchLayer, spec: LayerSpec) -> str:
    """Returns the name under which the time of a layer's choice is kept.

    Parts of a transform that are folded take no time, so they are not in it.
    """
    return choice_name(run_time_spec(layer, spec), layer.shape[0])


def choice_name(spec: LayerSpec, num_channels: int) -> str:
    """Returns all of a choice that its time may depend on, such as `w4 g32 a8 g32`.

    A group that is the whole channel is `g0`; a side in full precision is `w16` or `a16`. Whatever
    else is not a default follows by name.
    """
    parts = [
        *side_name("w", spec.weight, num_channels, OF_VALUES["weight"]),
        *side_name("a", spec.act, num_channels, OF_VALUES["act"]),
        *others(spec, {"weight", "act"}),
    ]
    return " ".join(parts)


def side_name(
    letter: str, side: WeightSpec | ActSpec | None, num_channels: int, skipped: set[str]
) -> Iterator[str]:
    """Yields the words for one side."""
    if side is None:
        yield f"{letter}16"
        return
    yield f"{letter}{side.bits}" if side.fmt is None else f"{letter}-{side.fmt.name}"
    yield f"g{side.group_size if side.group_size < num_channels else 0}"
    yield from others(side, NAMED | skipped)


def others(value: object, skipped: set[str]) -> Iterator[str]:
    """Yields the fields that are neither skipped nor at their defaults, as `name=value`."""
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        found = getattr(value, field.name)
        if field.name not in skipped and found != field.default:
            shown = found.to_json() if hasattr(found, "to_json") else found
            yield f"{field.name}={shown}"
