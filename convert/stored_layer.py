"""The tensors that a file stores for one quantized layer, read and checked by name and value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdit_convert.tensors import StoredTensor, bfloat16, shape_text
from qdit_jax.errors import UserError

MARKER = "comfy_quant"


@dataclass(frozen=True)
class StoredLayer:
    """A layer that says its format.

    Attributes:
        name: before the dot of its tensors' names.
        settings: what the marker says.
        parts: its tensors, by what stands after the dot.
    """

    name: str
    settings: Mapping[str, Any]
    parts: Mapping[str, StoredTensor]

    def number(self, name: str, default: int) -> int:
        """Returns a setting that is a positive whole number, also if it stands in `params`.

        Raises:
            UserError: if it is none.
        """
        value = self.setting(name, default)
        if type(value) is not int or value < 1:
            raise UserError(f"{self.name}: {name}={value!r} is not a positive whole number.")
        return value

    def setting(self, name: str, default: Any) -> Any:
        """Returns a setting, also if it stands in `params`."""
        more = self.settings.get("params")
        inner = more if isinstance(more, Mapping) else {}
        return self.settings.get(name, inner.get(name, default))

    def has(self, part: str) -> bool:
        """Returns whether the file has that tensor."""
        return part in self.parts

    def need(self, part: str, why: str) -> StoredTensor:
        """Returns a tensor of the layer; raises `UserError` if the file lacks it."""
        if part not in self.parts:
            raise UserError(f"1 tensor is missing: {self.name}.{part}, which {why} has.")
        return self.parts[part]

    def check(
        self, part: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
    ) -> None:
        """Raises `UserError` unless a tensor has one of the shapes and dtypes."""
        tensor = self.parts[part]
        if tensor.shape not in shapes:
            raise UserError(
                f"1 tensor has the wrong shape: {self.name}.{part} (found {shape_text(tensor.shape)}, "
                f"expected {' or '.join(map(shape_text, dict.fromkeys(shapes)))})."
            )
        if tensor.problem or tensor.dtype.name not in dtypes:
            raise UserError(
                f"{self.name}.{part} is {tensor.problem or tensor.dtype.name}; expected "
                f"{' or '.join(dtypes)}."
            )

    def read(self, part: str) -> np.ndarray:
        """Returns the values of a tensor."""
        return self.parts[part].read()

    def scales(self, part: str) -> np.ndarray:
        """Returns scales in float32, of any floating dtype.

        Raises:
            UserError: if one is NaN, infinite or negative.
        """
        return self.finite(part, least=0.0)

    def finite(self, part: str, least: float = -math.inf) -> np.ndarray:
        """Returns a tensor in float32; raises `UserError` for values that are not finite or too low."""
        values = self.read(part).astype(np.float32)
        bad = ~(np.isfinite(values) & (values >= least))
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            raise UserError(
                f"{int(bad.sum())} of {values.size} values of {self.name}.{part} are not "
                f"{'finite' if least == -math.inf else 'scales'}: {values[place]} at "
                f"{shape_text(place)}."
            )
        return values


# Dtypes of scales, by NumPy's names.
FLOATS = ("float32", bfloat16().name, "float16")
E4M3 = ("float8_e4m3fn",)
E8M0 = ("float8_e8m0fnu",)


def marker_settings(name: str, tensor: StoredTensor) -> dict[str, Any]:
    """Returns what a layer's marker says, JSON in bytes.

    Raises:
        UserError: if it is no JSON object.
    """
    try:
        if tensor.dtype.name not in ("uint8", "int8"):
            raise ValueError(f"it is {tensor.dtype.name}")
        found = json.loads(tensor.read().tobytes().decode())
    except ValueError as error:
        raise UserError(f"{name}.{MARKER} is not JSON in bytes ({str(error)[:80]}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{name}.{MARKER} is a {type(found).__name__}, not a JSON object.")
    return found
