"""Paths on the command line."""

from __future__ import annotations

import argparse

from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, as_path


def path_option(text: str) -> AnyPath:
    """Returns a path of an option, local or a URL such as `gs://bucket/name`."""
    try:
        return as_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
