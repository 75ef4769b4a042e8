"""Scores and paired measures of images and latents, from arrays and a `features_fn` given.

Nothing here loads a network: features arrive as arrays or as a function.
"""

from qdit_jax.metrics.classifier_score import inception_score
from qdit_jax.metrics.frechet import Extrapolation, frechet_distance, frechet_infinity
from qdit_jax.metrics.intervals import (
    Interval,
    PairedTest,
    bootstrap_band,
    bootstrap_interval,
    paired_test,
)
from qdit_jax.metrics.kernel_distance import kid, kid_of_subsets
from qdit_jax.metrics.manifold import manifold_radii, precision_and_recall
from qdit_jax.metrics.names import (
    DEMO_FEATURES,
    DEMO_FRECHET_DISTANCE,
    I3D_FEATURES,
    INCEPTION_FEATURES,
    label,
)
from qdit_jax.metrics.paired import cosine, decibels, psnr, signal_to_noise_db, ssim
from qdit_jax.metrics.reference import (
    Reference,
    Statistics,
    check_network,
    read_reference,
    statistics,
    write_reference,
)
from qdit_jax.metrics.samples import image_batches, image_shape
from qdit_jax.metrics.streaming import Moments, merge, moments
from qdit_jax.metrics.suite import Features, ScoreSettings, check_num_samples, extract, scores
from qdit_jax.metrics.video import flicker_error, frame_snr_db, temporal_flickering

__all__ = [
    "DEMO_FEATURES",
    "DEMO_FRECHET_DISTANCE",
    "I3D_FEATURES",
    "INCEPTION_FEATURES",
    "Extrapolation",
    "Features",
    "Interval",
    "Moments",
    "PairedTest",
    "Reference",
    "ScoreSettings",
    "Statistics",
    "bootstrap_band",
    "bootstrap_interval",
    "check_network",
    "check_num_samples",
    "cosine",
    "decibels",
    "extract",
    "flicker_error",
    "frame_snr_db",
    "frechet_distance",
    "frechet_infinity",
    "image_batches",
    "image_shape",
    "inception_score",
    "kid",
    "kid_of_subsets",
    "label",
    "manifold_radii",
    "merge",
    "moments",
    "paired_test",
    "precision_and_recall",
    "psnr",
    "read_reference",
    "scores",
    "signal_to_noise_db",
    "ssim",
    "statistics",
    "temporal_flickering",
    "write_reference",
]
