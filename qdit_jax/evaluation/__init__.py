"""Sampling checkpoints in pairs and measuring how far they are apart."""

from qdit_jax.evaluation.pages import compared_pictures, write_evaluation
from qdit_jax.evaluation.runs import (
    Contender,
    Protocol,
    Run,
    digest,
    run_evaluation,
    unless_unbegun,
)
from qdit_jax.evaluation.store import (
    first_samples,
    locked,
    merge,
    missing_shards,
    open_run,
    shard_ranges,
    write_shard,
)
from qdit_jax.evaluation.summary import MEASURES, summarize

__all__ = [
    "MEASURES",
    "Contender",
    "Protocol",
    "Run",
    "compared_pictures",
    "digest",
    "first_samples",
    "locked",
    "merge",
    "missing_shards",
    "open_run",
    "run_evaluation",
    "shard_ranges",
    "summarize",
    "unless_unbegun",
    "write_evaluation",
    "write_shard",
]
