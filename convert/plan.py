"""A conversion as data: which tensors of the file become which leaf of the parameter tree.

A family writes a `Plan` from the names and shapes alone. Checking it and carrying it out are the
same for every family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from qdit_convert.tensors import StateDict, StoredTensor, is_floating, listing, shape_text
from qdit_jax.errors import UserError

Shape = tuple[int, ...]
Params = dict[str, Any]
# From the array as the file stores it to the leaf's.
Transform: TypeAlias = Callable[[np.ndarray], np.ndarray]


def same(array: np.ndarray) -> np.ndarray:
    """Returns `array`: embeddings, biases, scales and stored tables stay as they are."""
    return array


def plain(leaf: Leaf, tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    """Returns no quantized leaves: every tensor is in full precision."""
    return {}


def linear(array: np.ndarray) -> np.ndarray:
    """Returns the kernel `[in, out]` of torch's `[out, in]`, also of a 1x1 convolution's."""
    return array.reshape(array.shape[:2]).T


def convolution(array: np.ndarray) -> np.ndarray:
    """Returns the kernel HWIO of torch's OIHW."""
    return array.transpose(2, 3, 1, 0)


def convolution3d(array: np.ndarray) -> np.ndarray:
    """Returns the kernel DHWIO of torch's OIDHW."""
    return array.transpose(2, 3, 4, 1, 0)


@dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree.

    Attributes:
        path: its names, joined by `/`.
        sources: tensors of the file, joined along their first axis.
        shapes: the shapes that each source may have.
        copies: further tensors that must equal the first source.
        values: computes the leaf where the file does not store it.
        each: the shape of every source, where they differ; `shapes` is then not read.
    """

    path: str
    sources: tuple[str, ...]
    shapes: tuple[Shape, ...]
    transform: Transform = same
    copies: tuple[str, ...] = ()
    values: Callable[[], np.ndarray] | None = None
    each: tuple[Shape, ...] = ()

    @property
    def expected(self) -> dict[str, tuple[Shape, ...]]:
        """Returns the shapes that each tensor of the file may have, copies included."""
        if self.each:
            return {key: (shape,) for key, shape in zip(self.sources, self.each, strict=True)}
        return dict.fromkeys((*self.sources, *self.copies), self.shapes)


@dataclass(frozen=True)
class Plan:
    """How one network is converted; `ignored` tensors are known and not needed."""

    family: str
    config: dict[str, Any]
    leaves: tuple[Leaf, ...]
    notes: tuple[str, ...] = ()
    ignored: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Example:
    """A small network in a layout, which the contract tests write to a file.

    Attributes:
        leaves: its leaves, under the file's own names.
        choices: what a user must say of it, by the fields of `Choices`.
        config: its config.json, where the layout has one.
        hints: the settings that lie beside the weights.
    """

    leaves: tuple[Leaf, ...]
    choices: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    hints: Mapping[str, object] = field(default_factory=dict)


def affine(path: str, key: str, kernel: Shape, transform: Transform = linear) -> list[Leaf]:
    """Returns the leaves of a layer with weight (torch shape `kernel`) and bias."""
    return [
        Leaf(f"{path}/kernel", (f"{key}.weight",), (kernel,), transform),
        Leaf(f"{path}/bias", (f"{key}.bias",), (kernel[:1],)),
    ]


def norm(path: str, key: str, width: int) -> list[Leaf]:
    """Returns the leaves of a normalization with scale and bias."""
    return [
        Leaf(f"{path}/scale", (f"{key}.weight",), ((width,),)),
        Leaf(f"{path}/bias", (f"{key}.bias",), ((width,),)),
    ]


def check_plan(plan: Plan, state: StateDict) -> None:
    """Raises `UserError` unless the file has exactly the tensors that `plan` needs."""
    expected = {key: shapes for leaf in plan.leaves for key, shapes in leaf.expected.items()}
    missing = [f"{k} {_shapes_text(s)}" for k, s in expected.items() if k not in state.tensors]
    unexpected = [
        f"{key} {shape_text(tensor.shape)}"
        for key, tensor in state.tensors.items()
        if key not in expected and key not in plan.ignored
    ]
    unexpected += [f"{key} (a {kind}, no tensor)" for key, kind in state.others.items()]
    misshapen = [
        f"{key} (found {shape_text(state.tensors[key].shape)}, expected {_shapes_text(shapes)})"
        for key, shapes in expected.items()
        if key in state.tensors and state.tensors[key].shape not in shapes
    ]
    problems = [
        _count(len(names), singular, plural) + listing(names, 4)
        for names, singular, plural in (
            (missing, "tensor is missing", "tensors are missing"),
            (unexpected, "tensor is unexpected", "tensors are unexpected"),
            (misshapen, "tensor has the wrong shape", "tensors have the wrong shape"),
        )
        if names
    ]
    if problems:
        raise UserError("; ".join(problems) + ".")
    _check_dtypes(expected, state.tensors)


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}: "


def _shapes_text(shapes: Iterable[Shape]) -> str:
    return " or ".join(shape_text(shape) for shape in shapes)


def _check_dtypes(expected: Iterable[str], tensors: Mapping[str, StoredTensor]) -> None:
    found = [(key, tensors[key]) for key in expected]
    strange = [f"{key} ({tensor.problem})" for key, tensor in found if tensor.problem]
    if strange:
        raise UserError(
            _count(len(strange), "tensor holds no plain numbers", "tensors hold no plain numbers")
            + f"{listing(strange)}; convert reads dense weights in float64, float32, float16 or "
            "bfloat16 (where the file came from: dequantize() or to_dense() them, or load the real ones)."
        )
    wrong = [f"{key} ({t.dtype})" for key, t in found if not is_floating(t.dtype)]
    narrow = [text for text in wrong if "(float8" in text]
    if wrong:
        what = "an 8-bit float" if len(narrow) == len(wrong) else "not floating point"
        raise UserError(
            _count(
                len(wrong),
                f"tensor is {what}",
                f"tensors are {what}".replace("an 8-bit float", "8-bit floats"),
            )
            + f"{listing(wrong)}; convert reads weights "
            "in float64, float32, float16 or bfloat16, and quantized ones only where the file says their "
            "format and scales (docs/formats-of-others.md)."
        )


def build_params(
    plan: Plan,
    tensors: Mapping[str, StoredTensor],
    dtype: np.dtype | None,
    on_leaf: Callable[[Leaf], None],
    place: Callable[[np.ndarray], Any] = same,
    quantized_fn: Callable[[Leaf, Mapping[str, StoredTensor]], Mapping[str, Any]] = plain,
) -> Params:
    """Returns the parameter tree, read from the file one leaf at a time.

    Args:
        dtype: of every leaf; None keeps that of the file (float64 becomes float32).
        on_leaf: called after each leaf, for a progress display.
        place: what each leaf is replaced by as soon as it is read, such as an array on a device.
        quantized_fn: returns the leaves, by path, of one that the file stores quantized; none of others.

    Raises:
        UserError: naming the tensors with NaN or inf, and copies that differ.
    """
    params: Params = {}
    bad: list[str] = []
    for leaf in plan.leaves:
        quantized = quantized_fn(leaf, tensors)
        for path, value in quantized.items():
            inserted(params, path, value)
        if not quantized:
            array, problems = read_leaf(leaf, tensors, dtype)
            inserted(params, leaf.path, place(array))
            bad += problems
        on_leaf(leaf)
    if bad:
        raise not_finite_error(bad)
    return params


def not_finite_error(bad: list[str]) -> UserError:
    """Returns the error that names tensors with NaN or inf."""
    counted = _count(len(bad), "tensor is not finite", "tensors are not finite")
    return UserError(f"{counted}{listing(bad)}.")


def read_leaf(
    leaf: Leaf, tensors: Mapping[str, StoredTensor], dtype: np.dtype | None
) -> tuple[np.ndarray, list[str]]:
    """Returns a leaf's array, and which of its tensors are not finite."""
    arrays = _read(leaf, tensors)
    bad = [text for key, array in arrays if (text := _not_finite(key, array))]
    whole = np.concatenate([a for _, a in arrays]) if len(arrays) > 1 else arrays[0][1]
    return _cast(leaf, leaf.transform(whole), dtype), bad


def problems_of(plan: Plan, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Returns which tensors of a whole file are not finite, reading one at a time."""
    plain_leaves = [
        leaf for leaf in plan.leaves if all(tensors[key].quantized is None for key in leaf.sources)
    ]
    arrays = (pair for leaf in plain_leaves for pair in _read(leaf, tensors))
    return [text for key, array in arrays if (text := _not_finite(key, array))]


def _read(leaf: Leaf, tensors: Mapping[str, StoredTensor]) -> list[tuple[str, np.ndarray]]:
    if leaf.values is not None:
        return [(leaf.path, leaf.values())]
    arrays = [(key, tensors[key].read()) for key in leaf.sources]
    for key in leaf.copies:
        if not np.array_equal(arrays[0][1], tensors[key].read(), equal_nan=True):
            raise UserError(
                f"{key} differs from {leaf.sources[0]}; convert can merge the embedders of the "
                "blocks only where they are equal, as in every published checkpoint."
            )
    return arrays


def _not_finite(key: str, array: np.ndarray) -> str:
    nan, inf = int(np.isnan(array).sum()), int(np.isinf(array).sum())
    counts = [f"{n} {what}" for n, what in ((nan, "NaN"), (inf, "inf")) if n]
    return f"{key} ({' and '.join(counts)} of {array.size} values)" if counts else ""


def _cast(leaf: Leaf, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Returns `array`, contiguous and in `dtype`, refusing values that would become inf."""
    if dtype is None:
        dtype = np.dtype("f4") if array.dtype == np.dtype("f8") else array.dtype
    with np.errstate(over="ignore"):
        out = np.array(array, dtype=dtype, order="C", copy=True)
    if out.dtype.itemsize < array.dtype.itemsize or array.dtype != dtype:
        lost = int((np.isinf(out) & np.isfinite(array)).sum())
        if lost:
            raise UserError(
                f"{leaf.path}: {lost} of {array.size} values are too large for {dtype}; "
                "choose another --dtype."
            )
    return out


def inserted(params: Params, path: str, leaf: object) -> None:
    """Puts a leaf into nested dicts, by its path."""
    *parents, name = path.split("/")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[name] = leaf


def block_count(keys: Iterable[str], prefix: str) -> int:
    """Returns how many numbered blocks there are under `prefix`, such as `"blocks."`.

    Raises:
        UserError: if a number between the first and the last is missing.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
    numbers = {int(found.group(1)) for key in keys if (found := pattern.match(key))}
    gaps = sorted(set(range(max(numbers, default=-1) + 1)) - numbers)
    if gaps:
        named = listing([f"{prefix}{i}" for i in gaps])
        raise UserError(
            f"the numbering of the blocks has a gap: {named} missing, though {prefix}{max(numbers)} is there."
        )
    return len(numbers)


def shape_of(tensors: Mapping[str, StoredTensor], key: str, rank: int) -> Shape:
    """Returns the shape of a tensor that determines the configuration.

    Raises:
        UserError: if it is missing, or has another number of axes.
    """
    if key not in tensors:
        raise UserError(f"1 tensor is missing: {key}, which settles the sizes of the network.")
    shape = tensors[key].shape
    if len(shape) != rank or 0 in shape:
        raise UserError(
            f"1 tensor has the wrong shape: {key} (found {shape_text(shape)}, "
            f"expected {rank} axes, none of them 0)."
        )
    return shape


def most_common(numbers: Iterable[int]) -> int:
    """Returns the number that occurs most often, the first of those."""
    listed = list(numbers)
    return max(listed, key=listed.count)
