"""Sampling checkpoints in pairs and measuring how far they are apart; scores of their samples."""

from qdit_jax.evaluation.autoencoders import with_autoencoder
from qdit_jax.evaluation.evaluating import (
    PAGES,
    check_results,
    evaluate,
    evaluated,
    judge_of,
    titles,
    with_known_autoencoder,
)
from qdit_jax.evaluation.layer_facts import Format
from qdit_jax.evaluation.limits import Layer, Limits, Outcome, most_bytes
from qdit_jax.evaluation.pages import write_evaluation
from qdit_jax.evaluation.pictures import CLIP, compared_pictures
from qdit_jax.evaluation.runs import Run, check_inputs, run_evaluation
from qdit_jax.evaluation.sample_file import SampleFile, sample_shape
from qdit_jax.evaluation.scoring import (
    Judge,
    Scoring,
    batch_size_of,
    check_features,
    check_kind,
    labeled,
    named_features,
    reference_path,
    reference_statistics,
    scoring_inputs,
)
from qdit_jax.evaluation.store import locked, merge, open_run
from qdit_jax.evaluation.summary import MEASURES, summarize
from qdit_jax.evaluation.trajectories import Contender, Protocol
from qdit_jax.evaluation.vbench import DIMENSIONS as VBENCH
from qdit_jax.evaluation.vbench import (
    VBenchPrompt,
    check_vbench,
    commands,
    export_vbench,
    read_prompts,
)
from qdit_jax.evaluation.vbench_results import (
    VBenchScore,
    read_vbench_results,
    vbench_rows,
    vbench_summary,
    vbench_text,
    write_vbench_page,
)
from qdit_jax.evaluation.verification import Verification, verify

__all__ = [
    "CLIP",
    "MEASURES",
    "PAGES",
    "VBENCH",
    "Contender",
    "Format",
    "Judge",
    "Layer",
    "Limits",
    "Outcome",
    "Protocol",
    "Run",
    "SampleFile",
    "Scoring",
    "VBenchPrompt",
    "VBenchScore",
    "Verification",
    "batch_size_of",
    "check_features",
    "check_inputs",
    "check_kind",
    "check_results",
    "check_vbench",
    "commands",
    "compared_pictures",
    "evaluate",
    "evaluated",
    "export_vbench",
    "judge_of",
    "labeled",
    "locked",
    "merge",
    "most_bytes",
    "named_features",
    "open_run",
    "read_prompts",
    "read_vbench_results",
    "reference_path",
    "reference_statistics",
    "run_evaluation",
    "sample_shape",
    "scoring_inputs",
    "summarize",
    "titles",
    "vbench_rows",
    "vbench_summary",
    "vbench_text",
    "verify",
    "with_autoencoder",
    "with_known_autoencoder",
    "write_evaluation",
    "write_vbench_page",
]
