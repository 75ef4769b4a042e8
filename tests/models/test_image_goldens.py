"""Sana and Z-Image against recorded calls of diffusers, from the file to the output."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_convert import convert

SANA, Z_IMAGE = "families/sana/diffusers", "families/z_image/diffusers_bf16"


@pytest.fixture(scope="module")
def converted(golden):
    found = {}

    def read(case):
        if case not in found:
            folder = golden(case)
            found[case] = convert(folder, dtype=None), dict(np.load(folder / "io.npz"))
        return found[case]

    return read


def applied(checkpoint, *inputs):
    return np.asarray(
        jax.jit(lambda *a: checkpoint.model.apply({"params": checkpoint.params}, *a))(*inputs)
    )


def assert_close(ours, reference):
    reference = np.moveaxis(np.asarray(reference, np.float32), -3, -1)
    assert ours.shape == reference.shape
    assert np.abs(ours - reference).max() <= 3e-5 * (1 + np.abs(reference).max())


@pytest.mark.parametrize(("masked", "out"), [(True, "out"), (False, "out_nomask")])
def test_outputs_of_sana(converted, masked, out):
    checkpoint, arrays = converted(SANA)
    x, timestep = np.moveaxis(arrays["x"], -3, -1), arrays["t"]
    condition = {"text": arrays["text"]}
    if masked:
        condition["text_mask"] = arrays["text_mask"] == 1
    checkpoint.model.check_condition(condition)
    found = applied(checkpoint, jnp.asarray(x), jnp.asarray(timestep, jnp.float32), condition)
    assert_close(found, arrays[out])


def test_outputs_of_z_image(converted):
    """Two texts of different lengths in one call, and each alone."""
    checkpoint, arrays = converted(Z_IMAGE)
    images = [np.moveaxis(arrays[f"x{i}"][:, 0], -3, -1) for i in range(2)]
    texts = [np.asarray(arrays[f"cap{i}"], np.float32) for i in range(2)]
    times = jnp.asarray(arrays["t"], jnp.float32)
    for i in range(2):
        one = {"text": texts[i][None]}
        found = applied(checkpoint, jnp.asarray(images[i])[None], times[i : i + 1], one)
        assert_close(found[0], arrays[f"out{i}"][:, 0])
    if images[0].shape == images[1].shape:
        rows = max(len(text) for text in texts)
        text = np.stack([np.pad(t, ((0, rows - len(t)), (0, 0)), constant_values=7) for t in texts])
        mask = np.arange(rows) < np.array([[len(t)] for t in texts])
        condition = {"text": text, "text_mask": mask}
        checkpoint.model.check_condition(condition)
        found = applied(checkpoint, jnp.asarray(np.stack(images)), times, condition)
        for i in range(2):
            assert_close(found[i], arrays[f"out{i}"][:, 0])


def test_layers_without_a_bias_in_the_file_keep_their_values(converted):
    """Kernels are as the file stores them, 16 bits wide; biases that it lacks are zeros."""
    checkpoint, _ = converted(Z_IMAGE)
    block = checkpoint.params["layers_0"]
    assert block["attention"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert not np.any(np.asarray(block["attention"]["qkv"]["bias"]))
    assert block["adaLN_modulation"]["bias"].dtype == jnp.bfloat16
