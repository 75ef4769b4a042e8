"""From PyTorch weights to a checkpoint of this library, and quantized back to files of others.

No torch is needed, and no code in a file runs.
"""

from qdit_convert.api import convert, convert_checkpoint, read_model
from qdit_convert.describe import describe, description_text
from qdit_convert.inverse import authors_shapes
from qdit_convert.reading import ReadModel
from qdit_convert.writing import FORMATS, Written, export

__all__ = [
    "FORMATS",
    "ReadModel",
    "Written",
    "authors_shapes",
    "convert",
    "convert_checkpoint",
    "describe",
    "description_text",
    "export",
    "read_model",
]
