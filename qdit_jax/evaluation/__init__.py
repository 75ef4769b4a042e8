"""Sampling checkpoints in pairs and measuring how far they are apart."""

from qdit_jax.evaluation.pages import compared_pictures, write_evaluation
from qdit_jax.evaluation.runs import Contender, Protocol, Run, run_evaluation
from qdit_jax.evaluation.store import merge
from qdit_jax.evaluation.summary import MEASURES, summarize

__all__ = [
    "MEASURES",
    "Contender",
    "Protocol",
    "Run",
    "compared_pictures",
    "merge",
    "run_evaluation",
    "summarize",
    "write_evaluation",
]
