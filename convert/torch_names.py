"""The names that a torch file may mention: those that torch's own safe loader allows, and a few more.

Each stands for something harmless of ours: a table, a number, a tensor of the file, or a label.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, BinaryIO, TypeVar

import numpy as np

from qdit_convert import torch_tensors as tensors
from qdit_convert.pickle_reader import REMEDY, Name, Namespace, mentioned_names, new_dict
from qdit_convert.torch_tensors import ElementType
from qdit_jax.errors import UserError

Result = TypeVar("Result")

STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}
NUMPY = (
    *("float64", "float32", "float16", "complex64", "complex128", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
)
ML_DTYPES = (
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
# dtypes that NumPy lacks, and the bytes of an element
OTHERS = {
    **{name: 1 for name in ("qint8", "quint8", "quint4x2", "quint2x4", "float4_e2m1fn_x2")},
    **{"qint32": 4, "complex32": 4, "bits16": 2, "bits8": 1, "bits4x2": 1, "bits2x4": 1},
    **{f"{sign}int{bits}": 1 for sign in ("", "u") for bits in range(1, 8)},
    "bits1x8": 1,
}
QSCHEMES = (
    *("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine"),
    *("per_channel_symmetric", "per_channel_affine_float_qparams"),
)


@dataclass(frozen=True)
class Label:
    """A value that is not a weight, such as a device or a layout: its type and its arguments."""

    name: str
    arguments: tuple = ()


class NumpyArray:
    """A NumPy array that lay beside the weights; its values are not kept."""

    def set_state(self, state: object) -> None:
        pass


class NumpyDtype:
    """The dtype of a NumPy scalar; the pickle gives the byte order after the dtype."""

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = str(code), "<"

    def set_state(self, state: Sequence[object]) -> None:
        self.order = str(state[1])


def known_names() -> dict[str, Name]:
    """Returns the globals that a file of weights may mention, by `module.name`."""
    table = {**_dtypes(), **_storages(), **_rebuilders(), **_builtins(), **_numpy()}
    table |= {
        "collections.OrderedDict": new_dict,
        "collections.Counter": lambda items=(): dict(items),
        "argparse.Namespace": Namespace,
        "torch.Size": _only(tuple, list | tuple),
        "torch.Tensor": None,
        "torch.nn.parameter.Parameter": tensors.rebuild_parameter,
        "torch.nn.parameter.Buffer": tensors.rebuild_parameter,
        "torch.device": lambda *arguments: Label("torch.device", arguments),
        "torch.serialization._get_layout": lambda name: Label("torch.layout", (name,)),
        **{f"torch.{name}": Label("torch.qscheme", (name,)) for name in QSCHEMES},
    }
    return {name: Name(name, value) for name, value in table.items()}


def _dtypes() -> dict[str, ElementType]:
    import ml_dtypes

    found = {name: ElementType(name, np.dtype(name)) for name in NUMPY}
    found |= {name: ElementType(name, np.dtype(getattr(ml_dtypes, name))) for name in ML_DTYPES}
    for name, size in OTHERS.items():
        what = "a quantized tensor" if name.startswith("q") else f"of torch.{name}"
        found[name] = ElementType(name, np.dtype(f"V{size}"), what)
    return {f"torch.{name}": kind for name, kind in found.items()}


def _storages() -> dict[str, ElementType]:
    dtypes = _dtypes()
    table = {}
    for module in ("torch", "torch.cuda"):
        for name, dtype in STORAGES.items():
            table[f"{module}.{name}Storage"] = dtypes[f"torch.{dtype}"]
        table[f"{module}.UntypedStorage"] = dtypes["torch.uint8"]
    return {**table, "torch.storage.UntypedStorage": dtypes["torch.uint8"]}


def _rebuilders() -> dict[str, Callable]:
    utils = {
        "tensor": tensors.rebuild_tensor,
        "tensor_v2": tensors.rebuild_tensor_v2,
        "tensor_v3": tensors.rebuild_tensor_v3,
        "parameter": tensors.rebuild_parameter,
        "parameter_with_state": tensors.rebuild_parameter,
        "qtensor": tensors.rebuild_quantized,
        "sparse_tensor": tensors.rebuild_sparse,
        "meta_tensor_no_storage": tensors.rebuild_meta,
        "nested_tensor": tensors.rebuild_nested,
        "wrapper_subclass": tensors.rebuild_wrapper,
        "device_tensor_from_cpu_tensor": tensors.rebuild_from_cpu,
    }
    table: dict[str, Callable] = {f"torch._utils._rebuild_{k}": v for k, v in utils.items()}
    return {**table, "torch._tensor._rebuild_from_type_v2": tensors.rebuild_from_type}


def _builtins() -> dict[str, Callable]:
    makers = {
        "set": _only(set, list | tuple),
        "frozenset": _only(frozenset, list | tuple),
        "bytearray": _only(bytearray, bytes),
        "complex": _only(complex, int | float),
    }
    table: dict[str, Callable] = {
        f"{module}.{name}": value
        for module in ("builtins", "__builtin__")
        for name, value in makers.items()
    }
    return {**table, "_codecs.encode": _encode}


def _numpy() -> dict[str, Any]:
    table: dict[str, Any] = {"numpy.dtype": NumpyDtype, "numpy.ndarray": None}
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray.scalar"] = _scalar
        table[f"{core}.multiarray._reconstruct"] = lambda *_: NumpyArray()
        table[f"{core}.numeric._frombuffer"] = lambda *_: NumpyArray()
    return table


def _only(function: Callable[..., Result], kinds: type | UnionType) -> Callable[..., Result]:
    """Returns `function` for arguments of `kinds` alone: `bytearray(10**12)` would fill the memory."""

    def call(*arguments: object) -> Result:
        if not all(isinstance(argument, kinds) for argument in arguments):
            raise UserError(f"the pickle inside makes a {function.__name__} of something else.")
        return function(*arguments)

    return call


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "ascii", "utf-8"):
        raise UserError("the pickle inside holds bytes in an encoding that torch does not write.")
    return text.encode(encoding)


def _scalar(dtype: object, data: object = None) -> Label | int | float | complex:
    """Returns a NumPy scalar as a Python number, or a label if it is not a number."""
    if not isinstance(dtype, NumpyDtype) or not isinstance(data, bytes):
        return Label("numpy.scalar")
    if not re.fullmatch(r"[iuf][1248]|b1|c8|c16", dtype.code):
        return Label("numpy.scalar", (dtype.code,))
    order = ">" if dtype.order == ">" else "<"
    return np.frombuffer(data, np.dtype(order + dtype.code))[0].item()


def refuse_modules(data: bytes | BinaryIO, names: dict[str, Name]) -> None:
    """Raises `UserError` for a whole pickled module, by the class that was pickled."""
    mentioned = mentioned_names(data)
    if not any(name.startswith("torch.nn.modules.") for name in mentioned):
        return
    first = next(name for name in mentioned if name not in names)
    raise UserError(
        f"this is a whole pickled object of class {first}, not a table of weights; convert runs no "
        f"code from a file ({REMEDY})."
    )
