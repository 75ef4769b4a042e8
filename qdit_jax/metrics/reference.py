"""Reference statistics in the `.npz` format of the published evaluator.

Keys: `mu`, `sigma` (pooled features), `mu_s`, `sigma_s` (spatial features), and images in `arr_0`
(`samples`). Ours adds `features` (the network's name) and `num_images`; other readers ignore them.
Dimensions: D features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qdit_jax.files import PathLike, as_path, write_arrays
from qdit_jax.metrics.clip_folder import clip_files
from qdit_jax.metrics.frechet import check_covariance
from qdit_jax.metrics.samples import DAMAGE, MEMBER, open_archive
from qdit_jax.metrics.streaming import Moments

KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The mean `[D]` and covariance `[D, D]` of one kind of features."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a reference file holds: statistics, the network they come from, and perhaps images."""

    pool: Statistics | None = None
    spatial: Statistics | None = None
    features: str | None = None
    num_images: int | None = None
    has_images: bool = False


def statistics(moments: Moments) -> Statistics:
    """Returns mean and unbiased covariance; `ValueError` for fewer than 2 samples."""
    return Statistics(moments.mean, moments.covariance)


def read_reference(path: PathLike) -> Reference:
    """Returns the statistics of an `.npz`, checked; its images stay on disk. A folder has clips alone.

    Raises:
        ValueError: if the file is damaged, holds neither statistics nor images, or the statistics
            have shapes that do not fit or a matrix that is not a covariance.
    """
    if as_path(path).is_dir():
        return Reference(num_images=len(clip_files(path)), has_images=True)
    with open_archive(path) as archive:
        names = archive.namelist()
    arrays = small_arrays(path)
    parts = {part: read_statistics(arrays, part, path) for part in KEYS}
    features = str(arrays["features"]) if "features" in arrays else None
    num_images = int(arrays["num_images"]) if "num_images" in arrays else None
    has_images = MEMBER in names
    if parts["pool"] is None and not has_images:
        raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma).")
    return Reference(**parts, features=features, num_images=num_images, has_images=has_images)


def small_arrays(path: PathLike) -> dict[str, np.ndarray]:
    """Returns what the file holds beside images; `ValueError` if any of it is damaged."""
    wanted = [key for pair in KEYS.values() for key in pair] + ["features", "num_images"]
    try:
        with as_path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
            return {key: data[key] for key in wanted if key in data}
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged, or holds pickled objects: {error}.") from None


def read_statistics(data: dict[str, np.ndarray], part: str, path: PathLike) -> Statistics | None:
    """Returns one kind of statistics, or None where the file has none."""
    mean_key, covariance_key = KEYS[part]
    if mean_key not in data and covariance_key not in data:
        return None
    if mean_key not in data or covariance_key not in data:
        raise ValueError(f"{path} must hold both {mean_key} and {covariance_key}, or neither.")
    mean, covariance = data[mean_key], data[covariance_key]
    numeric = all(np.issubdtype(a.dtype, np.floating) for a in (mean, covariance))
    if not numeric or mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"{path}: {mean_key} has shape {mean.shape} and {covariance_key} {covariance.shape} "
            f"({mean.dtype}, {covariance.dtype}); expected [D] and [D, D] floating point."
        )
    if not np.isfinite(mean).all():
        raise ValueError(f"{path}: {mean_key} holds NaN or infinite values.")
    try:
        check_covariance(covariance)
    except ValueError as error:
        raise ValueError(f"{path}: {covariance_key}: {error}") from None
    return Statistics(np.asarray(mean, np.float64), np.asarray(covariance, np.float64))


def write_reference(
    path: PathLike,
    *,
    pool: Statistics,
    spatial: Statistics | None = None,
    features: str,
    num_images: int,
    images: np.ndarray | None = None,
) -> None:
    """Writes statistics (float32, as the published files) and, if given, the images themselves."""
    arrays: dict[str, Any] = {
        "features": np.array(features),
        "num_images": np.array(num_images),
    }
    for part, value in (("pool", pool), ("spatial", spatial)):
        if value is not None:
            mean_key, covariance_key = KEYS[part]
            arrays[mean_key] = value.mean.astype(np.float32)
            arrays[covariance_key] = value.covariance.astype(np.float32)
    if images is not None:
        arrays["arr_0"] = np.asarray(images)
    write_arrays(path, arrays)


def check_network(reference: Reference, features: str, num_features: int, path: PathLike) -> None:
    """Raises `ValueError` if the statistics cannot come from the network in use."""
    if reference.features is not None and reference.features != features:
        raise ValueError(
            f"{path} holds statistics of the features {reference.features!r}, "
            f"but the samples are scored with {features!r}; use the same network for both."
        )
    if reference.pool is not None and reference.pool.mean.size != num_features:
        raise ValueError(
            f"{path} holds statistics of {reference.pool.mean.size} features, "
            f"but {features!r} has {num_features}; they come from another network."
        )
