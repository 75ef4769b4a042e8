"""Types of options that several verbs share."""

from __future__ import annotations

import argparse


def seed_number(text: str) -> int:
    """Returns the seed that `text` names; the parser's error if it is none."""
    from qdit_jax.sampling import check_seed

    try:
        return check_seed(int(text))
    except ValueError as error:
        reason = str(error) if text.strip().lstrip("+-").isdecimal() else "is no whole number"
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}") from error
