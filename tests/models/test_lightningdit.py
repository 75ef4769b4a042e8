"""LightningDiT against a recorded run of the authors' code, from the file to the output."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_convert import convert

CASE = "families/lightningdit/xl1_like"
FILE = "lightningdit-xl-imagenet256-64ep.pt"


@pytest.fixture(scope="module")
def network(golden):
    folder = golden(CASE)
    return convert(folder / FILE), np.load(folder / "io.npz")


def test_a_converted_file_gives_the_recorded_output(network):
    checkpoint, recorded = network
    out = checkpoint.model.apply(
        {"params": checkpoint.params},
        jnp.asarray(recorded["x"].transpose(0, 2, 3, 1)),
        jnp.asarray(recorded["t"]),
        jnp.asarray(recorded["y"]),
    )
    expected = recorded["out"].transpose(0, 2, 3, 1)
    assert np.abs(out - expected).max() <= 3e-5 * (1 + np.abs(expected).max())


def test_guidance_changes_the_first_three_channels(network):
    checkpoint, recorded = network
    denoise_fn = qdit.denoiser(checkpoint.model, checkpoint.params, guidance=3.0)
    x = jnp.asarray(recorded["x"][:1].transpose(0, 2, 3, 1))
    out = denoise_fn(x, jnp.array([0.3]), jnp.array([1]))
    expected = recorded["guided_t0p3"].transpose(0, 2, 3, 1)
    assert np.abs(out - expected).max() <= 3e-5 * (1 + np.abs(expected).max())


def test_what_the_file_tells_is_read_and_the_rest_is_said(network):
    checkpoint, _ = network
    model = checkpoint.model
    assert (model.num_heads, model.mlp_width, model.num_classes) == (4, 128, 9)
    assert model.rope
    assert model.rms_norm
    assert not model.qk_norm
    assert any("VA-VAE" in note for note in checkpoint.metadata["notes"])


def test_other_heads_than_the_tables_are_refused(golden):
    with pytest.raises(qdit.UserError, match="its tables are those of 4 heads"):
        convert(golden(CASE) / FILE, num_heads=2)
