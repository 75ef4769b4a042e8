"""The table of methods: a name is the name of a file here, whose `METHOD` is the row.

A file is imported when its method is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdit_jax.methods.method import Method

# In the order in which they are listed: the plain ones first.
METHODS = (
    "rtn",
    "gptq",
    "adaround",
    "brecq",
    "best",
    "qdit",
    "qdit_release",
    "gptq_authors",
    "ptq4dm",
    "repq_vit",
    "tfmq_dm",
    "ptq4dit",
    "g4w_p4a",
    "smoothquant",
    "awq",
    "convrot",
    "quarot",
    "vidit_q",
    "svdquant",
    "dirotq",
    "nf4",
    "lut4",
)


def method_named(name: str) -> Method:
    """Returns a method of the table; raises `ValueError` for a name that it lacks."""
    if name not in METHODS:
        raise ValueError(
            f"method={name!r} is not known; use one of {', '.join(METHODS)} (`qdit methods` "
            "describes them)."
        )
    return import_module(f"qdit_jax.methods.{name}").METHOD
