"""Reading JSON without repeated names."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from qdit_jax.errors import UserError


def read_once(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        UserError: if a name occurs twice in an object, where Python's own reader takes the last.
        ValueError: if `text` is not JSON.
    """
    return json.loads(text, object_pairs_hook=once)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the entries of an object; raises `UserError` if one name has several."""
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise UserError(f"it holds {twice[:200]!r} twice; remove the entry that is not meant")
    return content
