"""Image and reference files: round trips, streaming, and a sentence for everything wrong."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from qdit_jax.metrics import (
    Statistics,
    check_network,
    image_batches,
    image_shape,
    moments,
    read_reference,
    statistics,
    write_reference,
)


def read_images(path):
    return np.concatenate(list(image_batches(path, 1024)))


def some_images(count=10, shape=(8, 6, 3)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def some_statistics(width=5) -> Statistics:
    return statistics(moments(np.random.default_rng(1).normal(size=(40, width))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_images_come_back_in_order(tmp_path, save, batch_size):
    images = some_images()
    save(tmp_path / "a.npz", images, np.arange(10))  # labels, as published sample files carry
    assert image_shape(tmp_path / "a.npz") == images.shape
    batches = list(image_batches(tmp_path / "a.npz", batch_size))
    assert all(len(b) == batch_size for b in batches[:-1])
    np.testing.assert_array_equal(np.concatenate(batches), images)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (some_images() / 127.5 - 1, "float64; images must be uint8"),
        (some_images().astype(np.float32), "float32; images must be uint8"),
        (some_images().astype(np.int64), "int64; images must be uint8"),
        (some_images().transpose(0, 3, 1, 2).copy(), "channels first"),
        (some_images()[..., 0], r"\[N, H, W, 1 or 3\]"),
        (some_images(shape=(8, 8, 4)), r"\[N, H, W, 1 or 3\]"),
        (some_images(0), "no image"),
        (some_images() // 255, "span 0 to 255"),
        (np.asfortranarray(some_images()), "Fortran"),
    ],
)
def test_wrong_images_get_a_sentence(tmp_path, array, message):
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path / "a.npz")


def test_wrong_files_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        image_shape(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"not an \.npz file"):
        image_shape(tmp_path / "text.npz")
    np.savez(tmp_path / "b.npz", images=some_images())
    with pytest.raises(ValueError, match=r"no arr_0 .* it holds images"):
        image_shape(tmp_path / "b.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_never_gives_images(tmp_path, save):
    save(tmp_path / "a.npz", some_images(60, (16, 16, 3)))
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    rng = np.random.default_rng(2)
    for _ in range(25):
        damaged = bytearray(whole)
        for position in rng.integers(200, len(whole) - 200, 40):
            damaged[position] ^= int(rng.integers(1, 256))
        (tmp_path / "d.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"d\.npz"):
            read_images(tmp_path / "d.npz")
    for position in range(len(whole) - 300, len(whole)):  # the archive's directory
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        (tmp_path / "d.npz").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            read_reference(tmp_path / "d.npz")
            read_images(tmp_path / "d.npz")
    (tmp_path / "d.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_images(tmp_path / "d.npz")


def test_statistics_come_back(tmp_path):
    pool, spatial = some_statistics(5), some_statistics(3)
    path = tmp_path / "r.npz"
    write_reference(
        path, pool=pool, spatial=spatial, features="inception", num_images=40, images=some_images()
    )
    again = read_reference(path)
    np.testing.assert_allclose(again.pool.mean, pool.mean, rtol=1e-6)
    np.testing.assert_allclose(again.spatial.covariance, spatial.covariance, rtol=1e-6)
    assert (again.features, again.num_images, again.has_images) == ("inception", 40, True)
    np.testing.assert_array_equal(read_images(path), some_images())


def test_published_files_with_only_some_keys_are_read(tmp_path):
    pool = some_statistics()
    np.savez(tmp_path / "stats.npz", mu=pool.mean, sigma=pool.covariance)
    np.savez(tmp_path / "images.npz", some_images())
    only_statistics = read_reference(tmp_path / "stats.npz")
    assert only_statistics.features is None
    assert not only_statistics.has_images
    assert only_statistics.spatial is None
    only_images = read_reference(tmp_path / "images.npz")
    assert only_images.pool is None
    assert only_images.has_images


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.ones(3)}, "both mu and sigma"),
        ({"mu": np.ones(3), "sigma": np.eye(4)}, r"\(3,\) and sigma \(4, 4\)"),
        ({"mu": np.ones(3, int), "sigma": np.eye(3)}, "floating point"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu holds NaN"),
        ({"mu": np.ones(3), "sigma": -np.eye(3)}, "negative variances"),
        ({"mu": np.ones(3), "sigma": np.full((3, 3), np.inf)}, "NaN or infinite"),
        ({"weights": np.ones(3)}, "neither images"),
        ({"mu": np.ones(3), "sigma": np.array({})}, "damaged|pickle"),
    ],
)
def test_wrong_statistics_get_a_sentence(tmp_path, arrays, message):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "r.npz")


def test_statistics_of_another_network_are_refused(tmp_path):
    write_reference(tmp_path / "r.npz", pool=some_statistics(), features="demo", num_images=40)
    reference = read_reference(tmp_path / "r.npz")
    check_network(reference, "demo", 5, "r.npz")
    with pytest.raises(ValueError, match="'demo', but the samples are scored with 'inception'"):
        check_network(reference, "inception", 5, "r.npz")
    with pytest.raises(ValueError, match="5 features, but 'demo' has 64"):
        check_network(reference, "demo", 64, "r.npz")
