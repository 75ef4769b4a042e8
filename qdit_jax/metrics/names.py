"""What scores are called in reports: only Inception's and I3D's features carry the published names."""

from __future__ import annotations

DEMO_FEATURES = "demo"
INCEPTION_FEATURES = "inception"
I3D_FEATURES = "i3d"
DEMO_FRECHET_DISTANCE = "Fréchet distance (demo features)"

LABELS = {
    "frechet_distance": "FID",
    "spatial_frechet_distance": "sFID",
    "frechet_distance_infinity": "FID (infinite samples)",
    "inception_score": "Inception Score",
    "kernel_distance": "KID",
    "precision": "precision",
    "recall": "recall",
}
GENERAL_LABELS = {
    "frechet_distance": "Fréchet distance",
    "spatial_frechet_distance": "spatial Fréchet distance",
    "frechet_distance_infinity": "Fréchet distance at infinitely many samples",
    "inception_score": "classifier score",
    "kernel_distance": "kernel distance",
    "precision": "precision",
    "recall": "recall",
}


def label(score: str, features: str) -> str:
    """Returns the name of a score in reports, with the features it rests on unless they are a published score's.

    Raises:
        KeyError: for an unknown score.
    """
    if features == INCEPTION_FEATURES:
        return LABELS[score]
    if features == I3D_FEATURES and score == "frechet_distance":
        return "FVD"
    return f"{GENERAL_LABELS[score]} ({features} features)"
