"""PyTorch weights in, a checkpoint of this library out; without torch, and without running anything."""

from qdit_convert.api import ReadModel, convert, read_model
from qdit_convert.describe import describe, description_text

__all__ = ["ReadModel", "convert", "describe", "description_text", "read_model"]
