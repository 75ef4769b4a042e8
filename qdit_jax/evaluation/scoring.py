"""Scores of images in files against a reference, by a feature network that is named or loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdit_jax import metrics
from qdit_jax.checkpoint import load
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, PathLike, as_path
from qdit_jax.metrics import DEMO_FEATURES, I3D_FEATURES, INCEPTION_FEATURES
from qdit_jax.models import (
    DEMO_STATISTICS,
    I3D,
    FeaturesFn,
    InceptionV3,
    asset,
    demo_features_fn,
    i3d_features_fn,
    inception_features_fn,
)

# Wraps the batches of a file to show progress: batches, number of images, name of the file.
Watch = Callable[[Iterator[np.ndarray], int, str], Iterator[np.ndarray]]
ERRORS = {
    "frechet_distance_infinity": "frechet_distance_infinity_error",
    "inception_score": "inception_score_std",
    "kernel_distance": "kernel_distance_error",
}


IMAGE_BATCH, VIDEO_BATCH = 64, 8
# The feature networks that are brought, and the usual names of their files.
NETWORKS = {
    INCEPTION_FEATURES: (InceptionV3, "pt_inception-2015-12-05-6726825d.pth"),
    I3D_FEATURES: (I3D, "i3d_pretrained_400.pt"),
}


def unwatched(batches: Iterator[np.ndarray], count: int, name: str) -> Iterator[np.ndarray]:
    """Returns the batches as they are."""
    return batches


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How images are scored.

    Attributes:
        reference: an `.npz` of images or statistics, a folder of clips, or `"demo"`, the packaged one
            of digits.
        features: `("demo",)`, or `("inception", CKPT)` or `("i3d", CKPT)`, of videos, with the folder
            of a converted checkpoint.
        preprocessing: how Inception's input is prepared: `"published"` as in the published
            TensorFlow graph, `"port"` as in its common PyTorch port.
        settings: of the scores.
        batch_size: images, or videos, per call of the feature network.
    """

    reference: PathLike
    features: tuple[str, ...] = (DEMO_FEATURES,)
    preprocessing: str = "published"
    settings: metrics.ScoreSettings = dataclasses.field(default_factory=metrics.ScoreSettings)
    batch_size: int = 64

    @property
    def inputs(self) -> list[AnyPath]:
        """The files and folders that are read."""
        return scoring_inputs(self.reference, self.features)

    def judge(self, shape: tuple[int, ...], name: str) -> Judge:
        """Returns the judge of images `[N, H, W, C]` or videos `[N, T, H, W, C]` of a shape, all checked.

        `name` says in messages what the images are.

        Raises:
            ValueError: if network, reference and images do not fit, or the images are too few.
        """
        check_kind(self.features, shape, name)
        path = reference_path(self.reference)
        reference = metrics.read_reference(path)
        if reference.has_images:
            check_sizes(shape, metrics.image_shape(path), name, self.reference)
        features_fn, features = named_features(self.features, self.preprocessing)
        # A blank batch finds what does not fit before anything long starts.
        size = min(self.batch_size, shape[0])
        blank = features_fn(np.zeros((size, *shape[1:]), np.uint8))["pool"]
        metrics.check_network(reference, features, blank.shape[1], path)
        metrics.check_num_samples(shape[0], blank.shape[1], self.settings)
        given = str(self.reference)
        return Judge(features_fn, features, path, reference, self.settings, self.batch_size, given)


@dataclasses.dataclass(frozen=True)
class Judge:
    """A feature network, a reference, and the scores' settings, checked to fit."""

    features_fn: FeaturesFn
    features: str
    reference_path: AnyPath
    reference: metrics.Reference
    settings: metrics.ScoreSettings
    batch_size: int
    reference_name: str  # as it was given

    def scores(self, paths: Sequence[AnyPath], watch: Watch = unwatched) -> list[dict[str, Any]]:
        """Returns the scores of the images in each file, by the names of `metrics.names`."""
        real = None
        if self.reference.has_images:
            real = self.features_of(self.reference_path, "reference", watch)
        return [
            metrics.scores(
                self.features_of(path, path.stem, watch), self.reference, real, self.settings
            )
            for path in paths
        ]

    def features_of(self, path: AnyPath, name: str, watch: Watch) -> metrics.Features:
        """Returns the features of all images in a file."""
        batches = metrics.image_batches(path, self.batch_size)
        return metrics.extract(self.features_fn, watch(batches, metrics.image_shape(path)[0], name))


def batch_size_of(features: Sequence[str]) -> int:
    """Returns how many images, or videos, a feature network takes in one call by default."""
    return VIDEO_BATCH if features[0] == I3D_FEATURES else IMAGE_BATCH


def reference_statistics(
    reference: PathLike, features: Sequence[str], features_fn: FeaturesFn
) -> metrics.Statistics:
    """Returns the statistics in a reference; of one that holds images or clips alone, made of them.

    Raises:
        ValueError: if they come from other features.
    """
    path = reference_path(reference)
    found = metrics.read_reference(path)
    pool = found.pool
    if pool is None:
        batches = metrics.image_batches(path, batch_size_of(features))
        pool = metrics.statistics(metrics.moments(metrics.extract(features_fn, batches).pool))
    metrics.check_network(found, features[0], pool.mean.size, path)
    return pool


def scoring_inputs(reference: PathLike | None, features: Sequence[str]) -> list[AnyPath]:
    """Returns the paths of a reference and of a feature network, those that are given."""
    given = [] if reference in (None, "demo") else [reference]
    return [as_path(path) for path in [*given, *features[1:]]]


def reference_path(reference: PathLike) -> AnyPath:
    """Returns the path of a reference; that of the packaged statistics for `"demo"`."""
    return Path(str(asset(DEMO_STATISTICS))) if reference == "demo" else as_path(reference)


def check_features(features: Sequence[str]) -> None:
    """Raises `UserError` if `features` names no feature network."""
    kind, *rest = features
    if kind not in (DEMO_FEATURES, *NETWORKS):
        raise UserError(
            f"--features {kind} is unknown; use `demo`, `inception CKPT` or, for videos, `i3d CKPT`."
        )
    if len(rest) != (kind in NETWORKS):
        raise UserError(
            "--features takes `demo` alone, or `inception` or `i3d` and one checkpoint folder."
        )


def check_kind(features: Sequence[str], shape: tuple[int, ...], name: str) -> None:
    """Raises `UserError` if a network of videos is to score images, or one of images videos."""
    check_features(features)
    is_video, of_videos = len(shape) == 5, features[0] == I3D_FEATURES
    if is_video and not of_videos:
        raise UserError(
            f"{name} makes or holds videos, and --features {features[0]} scores images; use --features "
            "i3d CKPT for FVD, or score frames as images."
        )
    if of_videos and not is_video:
        raise UserError(f"{name} makes or holds images, and --features i3d scores videos.")


def named_features(
    features: Sequence[str], preprocessing: str = "published"
) -> tuple[FeaturesFn, str]:
    """Returns the feature function of that name, and the name of the features in reports."""
    check_features(features)
    if features[0] == DEMO_FEATURES:
        return demo_features_fn(), DEMO_FEATURES
    kind, folder = features
    checkpoint = load(folder)
    network, file = NETWORKS[kind]
    if not isinstance(checkpoint.model, network):
        raise UserError(
            f"{folder} holds a {type(checkpoint.model).__name__}, not {network.__name__}; make one "
            f"with `qdit convert {file} OUT`."
        )
    if kind == I3D_FEATURES:
        return i3d_features_fn(checkpoint.params), kind
    return inception_features_fn(checkpoint.params, half_pixel=preprocessing == "port"), kind


def check_sizes(
    samples: tuple[int, ...], reference: tuple[int, ...], name: str, reference_name: PathLike
) -> None:
    """Raises `UserError` if samples and reference images differ in size."""
    if samples[1:-1] != reference[1:-1]:
        sizes = ("x".join(map(str, shape[1:-1])) for shape in (samples, reference))
        raise UserError(
            f"{name} holds images of {next(sizes)} and {reference_name} of {next(sizes)}; scores "
            "compare images, or videos, of one size."
        )


def labeled(features: str, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns every score with the name that its features allow, and its error if it has one."""
    entries = {}
    for name, value in found.items():
        if name == "num_samples" or name in ERRORS.values():
            continue
        entries[name] = {"label": metrics.label(name, features), "value": value}
        if ERRORS.get(name) in found:
            entries[name]["error"] = found[ERRORS[name]]
    return entries
