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
    "qdit_release_gptq",
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


# What methods were called in earlier versions, or are called elsewhere.
ALIASES = {
    "gptq_authors": "qdit_release_gptq",
    "q_dit": "qdit",
    "q_dit_release": "qdit_release",
    "repqvit": "repq_vit",
    "viditq": "vidit_q",
}


def present_name(name: str) -> str:
    """Returns a method's name in `METHODS` for how people write it: `SVDQuant`, `vidit-q`.

    A name that means none of them comes back as it is.
    """
    plain = name.lower().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    return plain if plain in METHODS else name


def method_named(name: str) -> Method:
    """Returns a method of the table; raises `ValueError` for a name that it lacks."""
    name = present_name(name)
    if name not in METHODS:
        raise ValueError(
            f"method={name!r} is not known; use one of {', '.join(METHODS)} (`qdit methods` "
            "describes them)."
        )
    return import_module(f"qdit_jax.methods.{name}").METHOD
