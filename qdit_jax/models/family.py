"""The interface of networks, and the rows of the table of families.

A *network* is a linen module called as `model.apply({"params": params}, x, timestep, condition)`;
`Network` lists its further properties and methods. A *family* is one row of `families.FAMILIES`:
facts about a network's layers for the rest of the package, so that no other room contains a layer's
name.

Dimensions: B batch, K input channels of a layer.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from qdit_jax.models.folding import Covered, Fold, Producer, Segments
from qdit_jax.types import AnyArray, Condition, Params

# What an attention product multiplies: three projections and the weights between them. They are
# named `<attention>/operands/q`, so that a layer may be called `<attention>/q`.
OPERANDS = ("q", "k", "v", "softmax")
OPERANDS_OF = "/operands/"
# What a modulation's columns do, in the order in which the published networks have them.
SHIFT_SCALE_GATE = ("shift", "scale", "gate")
TABLE = "/embedding_table"  # ends the path of a label table; its rows are vectors


@runtime_checkable
class Network(Protocol):
    """The properties and methods of a network that denoises, beside its call.

    Attributes:
        prediction: what the output is: `"epsilon"`, `"velocity"`, `"v_prediction"` or `"sample"`.
        learned_variance: whether the output carries a variance in further channels.
        has_null: whether there is a null condition, which guidance needs.
        guided_channels: how many channels guidance changes by default; None is all.
        default_sampler: a name in `diffusion.SAMPLERS`.
        flow_times: of a velocity: the timestep that the network is called with at pure noise, and
            at the data.
        velocity_to: of a velocity: where it points, `"data"` or `"noise"`.

    A `NetworkModule` has the last two, and what else it says of a flow, from its class.
    """

    @property
    def prediction(self) -> str: ...

    @property
    def learned_variance(self) -> bool: ...

    @property
    def has_null(self) -> bool: ...

    @property
    def guided_channels(self) -> int | None: ...

    @property
    def default_sampler(self) -> str: ...

    @property
    def flow_times(self) -> tuple[float, float]: ...

    @property
    def velocity_to(self) -> str: ...

    def sample_shape(self) -> tuple[int, ...]:
        """Returns the shape of one sample, channels last."""

    def example_condition(self, batch: int) -> Condition:
        """Returns the condition of `batch` samples as `jax.ShapeDtypeStruct`s."""

    def all_conditions(self) -> Condition | None:
        """Returns every condition, one per class; None if they cannot be listed."""

    def null_condition(self, condition: Condition, params: Params) -> Condition | None:
        """Returns the null condition, shaped like `condition`; None if there is none."""

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` if concrete values of `condition` are out of range."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table of networks.

    Patterns are regular expressions that must match a whole layer path.

    Attributes:
        name: as stored in checkpoints.
        network: `module:Class`, imported when it is first used.
        is_diffusion: whether it denoises, as a `Network`.
        block: pattern of the path of one block.
        parts: name -> pattern of its layers. Every layer belongs to exactly one part; `"blocks"`
            holds the linear layers that presets quantize.
        attention: name -> pattern of attention modules, whose operands can be quantized.
        rounded_first: the part whose layers see the condition only, which sequential rounding
            takes before the blocks.
        outputs: pattern -> names of the equal chunks of a layer's columns, or `Segments`.
        inputs: pattern -> segments of the input of a layer that reads several outputs side by side.
        folds: where input transforms cost nothing at run time.
        gelu_inputs: pattern of layers whose input is a GELU's output.
        marks: parameters that a tree of this family has beside its layers; they distinguish
            families whose layers have the same names.
        examples: configurations of small networks of the family, one for each of its kinds: the
            contract tests build them.
    """

    name: str
    network: str
    is_diffusion: bool = True
    block: str = "(?!)"
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    attention: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rounded_first: str = ""
    outputs: Mapping[str, tuple[str, ...] | Segments] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, Segments] = dataclasses.field(default_factory=dict)
    folds: tuple[Fold, ...] = ()
    gelu_inputs: str = "(?!)"
    marks: tuple[str, ...] = ()
    examples: tuple[Mapping[str, Any], ...] = ({},)

    @property
    def network_class(self) -> type[nn.Module]:
        """Returns the linen class."""
        module, _, name = self.network.partition(":")
        return getattr(import_module(module), name)

    def part_pattern(self, part: str) -> str:
        """Returns the pattern of a part's layers, or of an attention's operands.

        Raises:
            ValueError: if the family has no such part.
        """
        if part in self.parts:
            return self.parts[part]
        chosen = self.attention if part == "attention" else {}
        if part in self.attention:
            chosen = {part: self.attention[part]}
        if not chosen:
            raise ValueError(
                f"part={part!r} is not known of family {self.name!r}; use one of "
                f"{', '.join(self.part_names)}."
            )
        modules = "|".join(chosen.values())
        modules = f"({modules})" if "|" in modules else modules
        return f"{modules}{OPERANDS_OF}({'|'.join(OPERANDS)})"

    @property
    def part_names(self) -> list[str]:
        """Returns the names that `part_pattern` knows."""
        more = ["attention", *self.attention] if self.attention else []
        return [*self.parts, *dict.fromkeys(more)]

    def part_of(self, layer: str) -> str | None:
        """Returns the part that a layer belongs to, or None.

        Raises:
            ValueError: if it belongs to several: the row is wrong.
        """
        found = [name for name, pattern in self.parts.items() if re.fullmatch(pattern, layer)]
        if len(found) > 1:
            raise ValueError(f"family {self.name!r}: {layer} belongs to {' and '.join(found)}.")
        return found[0] if found else None

    def block_of(self, path: str) -> str | None:
        """Returns the path of the block that a layer lies in, or None."""
        names = path.split("/")
        prefixes = ("/".join(names[:i]) for i in range(1, len(names) + 1))
        return next((p for p in prefixes if re.fullmatch(self.block, p)), None)

    def kind_of(self, layer: str) -> str:
        """Returns a layer's path within its block, the same in all blocks."""
        block = self.block_of(layer)
        return layer if block is None else layer.removeprefix(f"{block}/")

    def operands(self, layers: Iterable[str]) -> list[str]:
        """Returns the paths of the attention products' operands: `<attention>/operands/q`, ..."""
        modules = dict.fromkeys(path.rpartition("/")[0] for path in layers)
        patterns = self.attention.values()
        found = [m for m in modules if any(re.fullmatch(p, m) for p in patterns)]
        return [f"{module}{OPERANDS_OF}{name}" for module in found for name in OPERANDS]

    def chunk(self, layer: str, output: str, shape: tuple[int, ...]) -> slice:
        """Returns the columns of a layer that `outputs` calls `output`; all of them if empty.

        Args:
            shape: of the layer's kernel, `[..., N]`.
        """
        width = shape[-1]
        if not output:
            return slice(0, width)
        for pattern, names in self.outputs.items():
            if not re.fullmatch(pattern, layer):
                continue
            if isinstance(names, Segments):
                if (found := names.find(output, shape, width)) is not None:
                    return found
            elif output in names:
                size = width // len(names)
                first = names.index(output) * size
                return slice(first, first + size)
        raise ValueError(f"family {self.name!r}: {layer} has no output {output!r}.")

    def segment(self, layer: str, name: str, shape: tuple[int, ...]) -> slice:
        """Returns the input channels of a layer that `inputs` calls `name`; all of them if empty.

        Args:
            shape: of the layer's kernel, `[..., N]`.
        """
        width = math.prod(shape[:-1])
        if not name:
            return slice(0, width)
        for pattern, segments in self.inputs.items():
            found = segments.find(name, shape, width)
            if re.fullmatch(pattern, layer) and found is not None:
                return found
        raise ValueError(f"family {self.name!r}: {layer} has no input {name!r}.")

    def fold_of(self, layer: str, flat: Mapping[str, Any]) -> Fold | None:
        """Returns the fold of a layer's input, or of segments of it, with the paths of its producers.

        Columns that the network does not have (`Segments.optional`) are left out.

        Args:
            flat: its parameters, abstract or not, paths joined by `/`.
        """
        for fold in self.folds:
            if match := re.fullmatch(fold.layers, layer):
                found = (
                    dataclasses.replace(p, layer=match.expand(p.layer)) for p in fold.producers
                )
                there = tuple(p for p in found if not self.is_left_out(p, flat))
                return dataclasses.replace(fold, producers=there)
        return None

    def is_left_out(self, producer: Producer, flat: Mapping[str, Any]) -> bool:
        """Returns whether columns are optional, and the network of the parameters `flat` lacks them."""
        weight = flat.get(f"{producer.layer}/{producer.weight}")
        named = (
            names
            for pattern, names in self.outputs.items()
            if isinstance(names, Segments) and re.fullmatch(pattern, producer.layer)
        )
        return weight is not None and any(
            producer.output in names.optional
            and names.find(producer.output, weight.shape, weight.shape[-1]) is None
            for names in named
        )

    def covered(self, layer: str, flat: Mapping[str, Any]) -> Covered:
        """Returns which input channels of a layer its fold reaches with a scale and with a shift."""
        shape = flat[f"{layer}/kernel"].shape
        scale, shift = np.zeros((2, math.prod(shape[:-1])), bool)
        fold = self.fold_of(layer, flat)
        for producer in () if fold is None else fold.producers:
            reached = self.segment(layer, producer.inputs, shape)
            scale[reached] = True
            shift[reached] |= producer.shifted
        return Covered(scale, shift)

    def producers(self, layer: str, flat: Mapping[str, Any]) -> list[Producer]:
        """Returns what produces the whole input of a layer, so that a scale of it costs nothing at run
        time; empty if it has no such fold."""
        fold = self.fold_of(layer, flat)
        return (
            [] if fold is None or not self.covered(layer, flat).scale.all() else [*fold.producers]
        )

    def claims(self, params: Params) -> bool:
        """Returns whether a tree's layers are this family's: each belongs to one of its parts."""
        flat = flatten_dict(params, sep="/")
        layers = layers_of(flat)
        return (
            bool(layers)
            and all(self.part_of(layer) for layer in layers)
            and all(mark in flat for mark in self.marks)
        )


def layers_of(flat: Mapping[str, Any]) -> list[str]:
    """Returns the paths of all layers with a kernel in a flat tree, in its order."""
    return [path.removesuffix("/kernel") for path in flat if path.endswith("/kernel")]


def example_inputs(
    model: Network,
    batch: int = 1,
    shape: Sequence[int] | None = None,
    conditions: Condition = None,
) -> tuple[Any, ...]:
    """Returns abstract arguments of a call of a network that denoises, to trace it with.

    Args:
        shape: of one sample; the network's own by default.
        conditions: whose entries the arguments are like; the network's example by default.
    """
    size = model.sample_shape() if shape is None else shape
    condition = model.example_condition(batch)
    if conditions is not None:
        condition = jax.tree.map(partial(abstract_rows, batch), conditions)
    return (
        jax.ShapeDtypeStruct((batch, *size), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
        condition,
    )


def abstract_rows(batch: int, leaf: AnyArray) -> jax.ShapeDtypeStruct:
    """Returns `batch` rows of an array without their values; numbers of any width are float32."""
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    dtype = jnp.float32 if is_float else leaf.dtype
    return jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), dtype)


def is_concrete(array: AnyArray | jax.ShapeDtypeStruct) -> bool:
    """Returns whether an array's values can be read: not traced, abstract or on other hosts."""
    if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def as_condition(condition: Condition) -> Condition:
    """Returns a condition's entries as arrays, whole numbers as int32; None stays None."""
    if condition is None:
        return None
    if isinstance(condition, Mapping):
        return {name: as_condition(entry) for name, entry in condition.items()}
    array = cast(AnyArray, condition) if hasattr(condition, "shape") else np.asarray(condition)
    return array.astype(np.int32) if np.issubdtype(array.dtype, np.integer) else array
