"""What a quantized checkpoint really holds, layer by layer, compared with what its recipe says.

Nothing is computed: arrays are looked at by type, shape and settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.errors import UserError
from qdit_jax.kernels import (
    IMPLEMENTATIONS,
    implementation_of,
    layer_numerics,
    passed_over,
    unsupported_reason,
)
from qdit_jax.models import OPERANDS_OF, TABLE, rows_per_sample
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    QTensor,
    WeightSpec,
    effective_group_size,
    entry_name,
    kernel_of_other,
    other_kernel,
    slots,
)
from qdit_jax.recipes import LayerSpec, Recipe, other_weights
from qdit_jax.types import Params

NOT_QUANTIZED = "not quantized"


@dataclasses.dataclass(frozen=True)
class Format:
    """The format of a kernel or of a layer's input, in values that JSON has.

    Attributes:
        bits: per code.
        group_size: channels that really share a scale.
        symmetric: whether there is no zero point.
        fmt: the name of a number format in place of integers; None for integers.
        mode: of inputs: `"dynamic"`, `"static"` or `"static-per-timestep"`; None for weights.
        scale_levels: 2 where groups have whole-number scales on their output channel's scale.
    """

    bits: int
    group_size: int
    symmetric: bool
    fmt: str | None = None
    mode: str | None = None
    scale_levels: int = 1

    @property
    def text(self) -> str:
        """The format in a few letters, such as `4b g32 static`."""
        bits = f"{self.bits}b" if self.fmt is None else self.fmt
        mode = "" if self.mode in (None, "dynamic") else f" {self.mode}"
        levels = "x2" if self.scale_levels == 2 else ""
        return f"{bits} g{self.group_size}" + levels + ("s" if self.symmetric else "") + mode


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """One row of a verification, without what has to be measured.

    Attributes:
        path: of the layer, label table or attention operand.
        kind: `"linear"`, `"table"`, `"operand"`, or `"other"` for what no `Linear` computes.
        weights, inputs: the formats that are stored; None in full precision.
        numerics: what is computed: `"simulated"`, `"integer"`, or `"full precision"`.
        implementation: who computes the product, by the table of kernels; None for what is no
            product of a packed kernel.
        leaves: the entries beside the kernel that change its input or output.
        bytes_before, bytes_after: of the kernel, and of all that came to stand beside it.
        num_weights: values of the kernel.
        problem: what of the recipe is not there, in a few words; None if all is.
        passed_over: where XLA computes the product, the kernel that this platform has for such products,
            and why it does not: `NAME: sentence`; None if it has none, or an implementation is asked for.
    """

    path: str
    kind: str
    weights: Format | None
    inputs: Format | None
    numerics: str
    implementation: str | None
    leaves: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    num_weights: int
    problem: str | None
    passed_over: str | None = None


def layer_facts(
    checkpoint: Checkpoint,
    reference: Checkpoint,
    *,
    numerics: str,
    batch_size: int,
    rows: Mapping[str, int] | None = None,
) -> list[LayerFacts]:
    """Returns the facts of every layer that the recipe names or that is quantized, in order.

    `batch_size` is that of one network call, `rows` those of one sample in each layer (`rows_per_sample`); they may
    decide who computes a product.

    Raises:
        UserError: if the checkpoint has no recipe and nothing in it is quantized, or a layer
            cannot be computed with these numerics.
    """
    flat = dict(flatten_dict(checkpoint.params, sep="/"))
    full = dict(flatten_dict(reference.params, sep="/"))
    rows = rows_per_sample(checkpoint.model) if rows is None else rows
    recipe = checkpoint.recipe
    specs = {} if recipe is None else recipe.resolve(checkpoint.params)
    if recipe is not None:
        specs |= specs_over_time(reference.params, recipe)
    stored = [path for path in map(layer_of, flat) if is_quantized(flat, path)]
    stored += [path for path in flat if kernel_of_other(path) is not None]
    paths = [*specs, *(path for path in dict.fromkeys(stored) if path not in specs)]
    if not paths:
        raise UserError(
            "the checkpoint has no recipe, and nothing in it is quantized; give the output of "
            "`qdit quantize`."
        )
    model, found = checkpoint.model, []
    for path in paths:
        spec = specs.get(path)
        if OPERANDS_OF in path:
            found.append(operand_facts(flat, path, spec or LayerSpec()))
            continue
        num_rows = rows.get(own_path(path), 0) * batch_size
        facts_fn = kernel_facts if path == own_path(path) else other_kernel_facts
        found.append(facts_fn(flat, full, path, spec, num_rows, numerics, model))
    return found


def own_path(path: str) -> str:
    """Returns the path of the layer that a row is about; of `fc1/kernel_w8`, `fc1`."""
    own = kernel_of_other(path)
    return path if own is None else own[0].removesuffix("/kernel")


def specs_over_time(params: Params, recipe: Recipe) -> dict[str, LayerSpec]:
    """Returns the specs of the kernels that a recipe has at other timesteps, by their paths."""
    wanted = [] if recipe.over_time is None else recipe.over_time.other_weight_bits
    return {
        f"{path}/{other_kernel(bits)}": spec
        for bits in wanted
        for path, spec in other_weights(params, recipe, bits).items()
    }


def layer_of(name: str) -> str:
    """Returns the path of the layer whose entry `name` is, in a flat tree."""
    return name.removesuffix(TABLE).removesuffix("/kernel").removesuffix("/act_quant")


def is_quantized(flat: Mapping[str, Any], path: str) -> bool:
    """Returns whether a layer has a packed kernel or table, or a quantizer of its input."""
    leaf = flat.get(f"{path}/kernel", flat.get(path + TABLE))
    return isinstance(leaf, QTensor) or (leaf is not None and f"{path}/act_quant" in flat)


def kernel_facts(
    flat: Mapping[str, Any],
    full: Mapping[str, Any],
    path: str,
    spec: LayerSpec | None,
    num_rows: int,
    numerics: str,
    model: Any,
) -> LayerFacts:
    """Returns the facts of a layer or label table; `num_rows` 0 means that no `Linear` computes it."""
    is_table = path + TABLE in flat
    name = path + TABLE if is_table else f"{path}/kernel"
    kernel, act = flat[name], flat.get(f"{path}/act_quant")
    num_weights = full[name].size
    shape = (num_weights // full[name].shape[-1], full[name].shape[-1])
    channels = shape[1] if is_table else shape[0]
    beside = {slot: flat[f"{path}/{slot}"] for slot in other_slots() if f"{path}/{slot}" in flat}
    weights = weight_format(kernel) if isinstance(kernel, QTensor) else None
    inputs = None if act is None else act_format(act, channels)
    implementation, over = None, None
    kind = "table" if is_table else "linear" if num_rows else "other"
    if kind == "linear" and isinstance(kernel, QTensor):
        implementation, over = who_computes(path, kernel, act, num_rows, numerics, model)
    return LayerFacts(
        path=path,
        kind=kind,
        weights=weights,
        inputs=inputs,
        numerics=numerics if weights is not None else "full precision",
        implementation=implementation,
        leaves=tuple(beside),
        bytes_before=full[name].nbytes,
        bytes_after=nbytes_of([kernel, act, *beside.values()]),
        num_weights=num_weights,
        problem=None if spec is None else problem_of(spec, weights, inputs, channels),
        passed_over=over,
    )


def other_kernel_facts(
    flat: Mapping[str, Any],
    full: Mapping[str, Any],
    path: str,
    spec: LayerSpec | None,
    num_rows: int,
    numerics: str,
    model: Any,
) -> LayerFacts:
    """Returns the facts of a layer's kernel of other bits, whose bytes come on top of its own."""
    own = own_path(path)
    if path not in flat:
        facts = kernel_facts(flat, full, own, spec, num_rows, numerics, model)
        facts = dataclasses.replace(
            facts,
            bytes_after=0,
            weights=None,
            implementation=None,
            passed_over=None,
            problem=NOT_QUANTIZED,
        )
    else:
        placed = {**flat, f"{own}/kernel": flat[path]}
        facts = kernel_facts(placed, full, own, spec, num_rows, numerics, model)
        facts = dataclasses.replace(facts, bytes_after=nbytes_of([flat[path]]))
    return dataclasses.replace(facts, path=path, leaves=(), bytes_before=0, num_weights=0)


def operand_facts(flat: Mapping[str, Any], path: str, spec: LayerSpec) -> LayerFacts:
    """Returns the facts of an operand of an attention product, which has no weights."""
    act = flat.get(operand_entry(path))
    inputs = None if act is None else act_format(act, None)
    return LayerFacts(
        path=path,
        kind="operand",
        weights=None,
        inputs=inputs,
        numerics="simulated" if act is not None else "full precision",
        implementation=None,
        leaves=(),
        bytes_before=0,
        bytes_after=nbytes_of([act]),
        num_weights=0,
        problem=problem_of(spec, None, inputs, None),
    )


def operand_entry(path: str) -> str:
    """Returns the key of an operand's quantizer in a flat tree."""
    return entry_name(path.replace(OPERANDS_OF, "/"), "act_quant", operand=True)


def other_slots() -> list[str]:
    """Returns the entries beside a kernel that map its input or add to its output."""
    return [*slots("input"), *slots("output")]


def nbytes_of(leaves: list[Any]) -> int:
    """Returns the bytes of all arrays of some leaves."""
    return sum(array.nbytes for array in jax.tree.leaves(leaves))


def weight_format(q: QTensor) -> Format:
    """Returns the format that a kernel is stored in."""
    size = effective_group_size(q.shape[0], q.group_size)
    name = None if q.fmt is None else q.fmt.name
    levels = 2 if q.fmt is None and q.has_levels else 1
    return Format(q.bits, size, q.symmetric, name, scale_levels=levels)


def act_format(act: ActQuant, channels: int | None) -> Format:
    """Returns the format that an input is rounded to; without `channels`, whole groups are 0."""
    return spec_format(act.spec, channels)


def spec_format(spec: WeightSpec | ActSpec, channels: int | None) -> Format:
    """Returns the format that a spec asks for."""
    size = spec.group_size if channels is None else effective_group_size(channels, spec.group_size)
    mode = None
    if isinstance(spec, ActSpec):
        mode = spec.mode + ("-per-timestep" if spec.per_timestep else "")
    fmt = None if spec.fmt is None else spec.fmt.name
    levels = spec.scale_levels if isinstance(spec, WeightSpec) else 1
    return Format(spec.bits, size, spec.symmetric, fmt, mode, levels)


def problem_of(
    spec: LayerSpec, weights: Format | None, inputs: Format | None, channels: int | None
) -> str | None:
    """Returns in a few words what of a spec is not stored, or stored otherwise; None if all is."""
    sides = [("weights", spec.weight, weights), ("input", spec.act, inputs)]
    asked = {
        side: (spec_format(wanted, channels), found) for side, wanted, found in sides if wanted
    }
    missing = [side for side, (_, found) in asked.items() if found is None]
    if missing:
        what = "" if len(missing) == len(asked) else f": its {missing[0]} stay in full precision"
        what = what.replace("input stay", "input stays")
        return NOT_QUANTIZED + what
    for side, (wanted, found) in asked.items():
        if wanted != found:
            assert found is not None
            return f"{side} stored as {found.text} where the recipe says {wanted.text}"
    return None


def who_computes(
    path: str,
    kernel: QTensor,
    act: ActQuant | None,
    num_rows: int,
    numerics: str,
    model: Any,
) -> tuple[str, str | None]:
    """Returns the name of the implementation that computes a layer, and what it was `passed_over` for.

    Raises:
        UserError: if none can with these numerics; it names the layer.
    """
    shape, forced = (num_rows, kernel.shape[0]), getattr(model, "implementation", None)
    dtype = getattr(model, "dtype", "float32")
    # Without scales: an unpicked table would be refused, and its rows make no difference here.
    settings = None if act is None else ActQuant(act.spec)
    numerics = layer_numerics(act, numerics)
    reason = unsupported_reason(shape, kernel, settings, numerics, forced, dtype=dtype)
    if reason is not None:
        raise UserError(f"{path}: {reason}")
    if forced:
        return forced, None
    product = (shape, kernel, settings, numerics)
    return implementation_of(*product, dtype=dtype), passed_over(*product, dtype=dtype)


def check_implementation(name: str | None) -> None:
    """Raises `UserError` unless `name` is None or an entry of the table of kernels."""
    if name is not None and name not in IMPLEMENTATIONS:
        raise UserError(
            f"implementation={name!r} is not known; use one of {', '.join(IMPLEMENTATIONS)}."
        )
