"""All scores of one set of samples against a reference, from a feature network given as a function.

Dimensions: N samples, B samples of a batch, D features, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from qdit_jax.metrics.classifier_score import inception_score
from qdit_jax.metrics.frechet import frechet_distance, frechet_infinity
from qdit_jax.metrics.kernel_distance import kid
from qdit_jax.metrics.manifold import precision_and_recall
from qdit_jax.metrics.reference import Reference, statistics
from qdit_jax.metrics.streaming import BLOCK_ROWS, Moments, merge_all, moments
from qdit_jax.types import AnyArray

# Takes uint8 images `[B, H, W, C]`; gives `pool [B, D]` and, where the network has them,
# `spatial [B, D']` and `probabilities [B, C]`.
FeaturesFn = Callable[[np.ndarray], Mapping[str, AnyArray]]


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of one set of images; spatial ones as moments only, they are never paired."""

    pool: np.ndarray
    spatial: Moments | None = None
    probabilities: np.ndarray | None = None


def extract(features_fn: FeaturesFn, batches: Iterable[np.ndarray]) -> Features:
    """Returns the features of all images; the images themselves are not kept.

    Raises:
        ValueError: if there is no batch.
    """
    parts: dict[str, list[np.ndarray]] = {"pool": [], "probabilities": [], "spatial": []}
    spatial: list[Moments] = []
    for batch in batches:
        # A last, shorter batch is padded, so that a jitted network compiles once.
        size = max(len(batch), len(parts["pool"][0]) if parts["pool"] else 0)
        padded = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), 0)])
        for name, value in features_fn(padded).items():
            if name in parts:
                parts[name].append(np.asarray(value, np.float32)[: len(batch)])
        if sum(map(len, parts["spatial"])) >= BLOCK_ROWS:
            spatial = [merge_all([*spatial, moments(np.concatenate(parts["spatial"]))])]
            parts["spatial"] = []
    if not parts["pool"]:
        raise ValueError("there are no images to score.")
    if parts["spatial"]:
        spatial.append(moments(np.concatenate(parts["spatial"])))
    probabilities = np.concatenate(parts["probabilities"]) if parts["probabilities"] else None
    return Features(
        np.concatenate(parts["pool"]), merge_all(spatial) if spatial else None, probabilities
    )


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """How the scores are computed; the defaults are those of the published evaluator.

    `kernel_samples` bounds the samples of each set that the kernel distance uses: its time grows
    with their square.
    """

    neighbors: int = 3
    split_size: int = 5000
    kernel_samples: int = 10_000
    min_samples: int | None = None
    seed: int = 0


def scores(
    samples: Features,
    reference: Reference,
    reference_features: Features | None = None,
    settings: ScoreSettings | None = None,
) -> dict[str, int | float]:
    """Returns every score that the inputs allow, by the names in `names.LABELS`.

    Statistics in `reference` come first; what it lacks is computed from `reference_features`,
    without which precision, recall and the kernel distance are left out.

    Raises:
        ValueError: if there are too few samples, or the features come from different networks.
    """
    settings = settings or ScoreSettings()
    check_num_samples(len(samples.pool), samples.pool.shape[1], settings)
    result: dict[str, int | float] = {"num_samples": len(samples.pool)}
    result |= distances(samples, reference, reference_features, settings)
    if samples.probabilities is not None:
        mean, spread = inception_score(samples.probabilities, split_size=settings.split_size)
        result["inception_score"] = mean
        if len(samples.pool) > settings.split_size:  # one split alone has no spread
            result["inception_score_std"] = spread
    if reference_features is not None:
        result |= comparisons(samples.pool, reference_features.pool, settings)
    return result


def check_num_samples(count: int, width: int, settings: ScoreSettings) -> None:
    """Raises `ValueError` if samples are fewer than a covariance of full rank needs."""
    needed = width + 1 if settings.min_samples is None else max(settings.min_samples, 2)
    if count < needed:
        raise ValueError(
            f"{count} samples are too few: at least {needed} are needed "
            f"(the network has {width} features, and fewer samples leave their covariance "
            "without full rank and the score mostly bias); lower --min-samples to score them anyway."
        )


def distances(
    samples: Features,
    reference: Reference,
    reference_features: Features | None,
    settings: ScoreSettings,
) -> dict[str, int | float]:
    """Returns the Fréchet distances of pooled and, where both sides have them, spatial features."""
    pool, spatial = reference.pool, reference.spatial
    if reference_features is not None:
        pool = pool or statistics(moments(reference_features.pool))
        if reference_features.spatial is not None:
            spatial = spatial or statistics(reference_features.spatial)
    if pool is None:
        raise ValueError("the reference has neither statistics nor images.")
    own = moments(samples.pool)
    result: dict[str, int | float] = {
        "frechet_distance": frechet_distance(pool.mean, pool.covariance, own.mean, own.covariance)
    }
    if samples.spatial is not None and spatial is not None:
        own = samples.spatial
        result["spatial_frechet_distance"] = frechet_distance(
            spatial.mean, spatial.covariance, own.mean, own.covariance
        )
    if len(samples.pool) >= 10 * samples.pool.shape[1]:
        limit = frechet_infinity(pool.mean, pool.covariance, samples.pool, seed=settings.seed)
        result["frechet_distance_infinity"] = limit.value
        result["frechet_distance_infinity_error"] = limit.standard_error
    return result


def comparisons(
    samples: np.ndarray, reference: np.ndarray, settings: ScoreSettings
) -> dict[str, int | float]:
    """Returns the scores that need the reference's single features."""
    precision, recall = precision_and_recall(reference, samples, k=settings.neighbors)
    rng = np.random.default_rng(settings.seed)
    limit = settings.kernel_samples
    few = [x[rng.permutation(len(x))[:limit]] for x in (reference, samples)]
    distance, error = kid(*few)
    return {
        "precision": precision,
        "recall": recall,
        "kernel_distance": distance,
        "kernel_distance_error": error,
    }
