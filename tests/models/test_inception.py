"""FID's Inception network: names, preprocessing, and equality with a torch definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_convert import read_model
from qdit_jax.models import InceptionV3
from qdit_jax.models.inception import average_pool, preprocess, resize_matrix


def abstract() -> tuple[dict, dict]:
    x = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    outputs, variables = jax.eval_shape(InceptionV3().init_with_output, jax.random.key(0), x)
    return outputs, variables["params"]


def test_sizes_are_the_published_ones():
    outputs, params = abstract()
    assert {k: v.shape for k, v in outputs.items()} == {
        "pool": (2, 2048),
        "spatial": (2, 2023),
        "logits": (2, 1008),
        "probabilities": (2, 1008),
    }
    assert params["Conv2d_1a_3x3"]["conv"]["kernel"].shape == (3, 3, 3, 32)
    assert set(params["Conv2d_1a_3x3"]["bn"]) == {"scale", "bias", "mean", "var"}
    assert params["Mixed_6c"]["branch7x7dbl_5"]["conv"]["kernel"].shape == (1, 7, 160, 192)
    assert params["fc"]["kernel"].shape == (2048, 1008)
    # 94 units of five tensors, and the classifier.
    assert len(jax.tree.leaves(params)) == 94 * 5 + 2


def test_average_pool_leaves_the_padding_out():
    np.testing.assert_allclose(average_pool(jnp.ones((1, 4, 5, 2))), 1, rtol=1e-6)
    corner = average_pool(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, 0, 0, 0]
    assert corner == pytest.approx((0 + 1 + 3 + 4) / 4)


@pytest.mark.parametrize("size", [1, 2, 16, 28, 64, 256, 299, 512])
@pytest.mark.parametrize("half_pixel", [False, True])
def test_resizing_samples_a_ramp_where_it_should(size, half_pixel):
    weights = resize_matrix(size, half_pixel)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    target = np.arange(299)
    position = (target + 0.5) * size / 299 - 0.5 if half_pixel else target * size / 299
    ramp = weights.astype(np.float64) @ np.arange(size)
    np.testing.assert_allclose(ramp, np.clip(position, 0, size - 1), atol=1e-4)
    if size == 299:
        np.testing.assert_array_equal(weights, np.eye(299))


def test_the_two_conventions_span_their_ranges():
    extremes = np.array([0, 255], np.uint8).repeat(3 * 4).reshape(2, 2, 2, 3)
    published, port = preprocess(extremes), preprocess(extremes, half_pixel=True)
    np.testing.assert_allclose([published.min(), published.max()], [-1, 127 / 128], atol=1e-6)
    np.testing.assert_allclose([port.min(), port.max()], [-1, 1], atol=1e-6)


def test_gray_images_equal_their_three_channel_copies():
    gray = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 1), np.uint8)
    np.testing.assert_array_equal(preprocess(gray), preprocess(gray.repeat(3, -1)))
    with pytest.raises(ValueError, match="1 or 3 channels"):
        preprocess(gray.repeat(2, -1))


def test_half_pixel_resizing_equals_torch():
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(1).integers(0, 256, (1, 40, 333, 3), np.uint8)
    x = torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float32) / 255
    kind = {"size": (299, 299), "mode": "bilinear", "align_corners": False}
    expected = 2 * torch.nn.functional.interpolate(x, **kind).numpy() - 1
    found = np.moveaxis(np.asarray(preprocess(images, half_pixel=True)), -1, 1)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_random_network_equals_torch(tmp_path):
    torch = pytest.importorskip("torch")
    from torch_inception import random_inception

    peer = random_inception()
    torch.save(peer.state_dict(), tmp_path / "port.pth")
    params = read_model(tmp_path / "port.pth").params
    _, expected_params = abstract()
    shapes = [jax.tree.map(lambda leaf: leaf.shape, p) for p in (params, expected_params)]
    assert shapes[0] == shapes[1]
    images = np.random.default_rng(2).integers(0, 256, (2, 64, 48, 3), np.uint8)
    x = preprocess(images)
    with torch.no_grad():
        outputs = peer(torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy()))
    pool, spatial, logits, unbiased = (out.numpy() for out in outputs)
    found = jax.jit(InceptionV3().apply)({"params": params}, x)
    shifted = np.exp(unbiased - unbiased.max(1, keepdims=True))
    expected = {
        "pool": pool,
        "spatial": spatial,
        "logits": logits,
        "probabilities": shifted / shifted.sum(1, keepdims=True),
    }
    assert pool.std() > 0.05
    assert (spatial > 0).mean() > 0.2
    for name, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, atol=5e-5 * scale, err_msg=name)
