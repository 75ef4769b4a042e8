"""Ways to quantize a network: a table of methods, and the exact input transforms that they use.

A name is imported from its file when it is first used, so that the names of the methods alone are
quick to have.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qdit_jax.errors import earlier_names
from qdit_jax.methods.table import METHODS, method_named, present_name

if TYPE_CHECKING:
    from qdit_jax.methods.api import quantize
    from qdit_jax.methods.choice_fits import FittedChoice, fitted_choices
    from qdit_jax.methods.data import CalibrationData, qdit_release_items, spread_items
    from qdit_jax.methods.default import method_for
    from qdit_jax.methods.fitting import fit_rounding
    from qdit_jax.methods.folds import fold_inputs, producers
    from qdit_jax.methods.method import Method
    from qdit_jax.methods.named_transforms import missing_for
    from qdit_jax.methods.report import LayerReport, Report

# File -> what it has for other rooms.
LAZY = {
    "api": ("quantize",),
    "data": ("CalibrationData", "qdit_release_items", "spread_items"),
    "choice_fits": ("FittedChoice", "fitted_choices"),
    "default": ("method_for",),
    "fitting": ("fit_rounding",),
    "folds": ("fold_inputs", "producers"),
    "method": ("Method",),
    "named_transforms": ("missing_for",),
    "report": ("LayerReport", "Report"),
}
FILE_OF = {name: file for file, names in LAZY.items() for name in names}

__all__ = [
    "METHODS",
    "CalibrationData",
    "FittedChoice",
    "LayerReport",
    "Method",
    "Report",
    "fit_rounding",
    "fitted_choices",
    "fold_inputs",
    "method_for",
    "method_named",
    "missing_for",
    "present_name",
    "producers",
    "qdit_release_items",
    "quantize",
    "spread_items",
]


def __getattr__(name: str) -> Any:
    """Returns a public name, imported from its file now."""
    if name not in FILE_OF:
        return earlier_names(__name__, {"authors_items": "qdit_release_items"})(name)
    return getattr(import_module(f"{__name__}.{FILE_OF[name]}"), name)
