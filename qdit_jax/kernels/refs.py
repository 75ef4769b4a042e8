"""What Pallas gives to kernels: references to memory, whole or parts of it."""

from __future__ import annotations

from typing import Any, TypeAlias

# Pallas has public types of whole references only, and none of slices or of what a slice is.
Ref: TypeAlias = Any
Span: TypeAlias = Any
