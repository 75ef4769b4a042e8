"""From PyTorch weights to a checkpoint of this library, without torch or running code in files."""

from qdit_convert.api import ReadModel, convert, read_model
from qdit_convert.describe import describe, description_text

__all__ = ["ReadModel", "convert", "describe", "description_text", "read_model"]
