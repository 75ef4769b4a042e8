"""Reads the JSON of other programs: configurations, indices and headers, without repeated names."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from qdit_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in the file `path`.

    Raises:
        UserError: as `parse_json` does.
    """
    return parse_json(path.read_bytes(), path.name)


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Returns the JSON object in `text`; `what` names it in messages.

    JSON itself allows a name twice in an object, and readers differ in which value they take;
    Python's reader also takes NaN and Infinity, which JSON lacks, and rounds 1e999 to infinity.

    Raises:
        UserError: if `text` is not a JSON object, has a name twice or a number that is not finite.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(
                f"{what} holds {twice[:200]!r} twice; remove the entry that is not meant."
            )
        return content

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse(number)

    def refuse(number: str) -> NoReturn:
        raise UserError(f"{what} holds the number {number[:40]}, which is not finite.")

    try:
        content = json.loads(
            text, object_pairs_hook=once, parse_float=finite, parse_constant=refuse
        )
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON ({str(error)[:80]}).") from None
    if not isinstance(content, dict):
        raise UserError(f"{what} is not a JSON object.")
    return content
