"""Seeds and labels out of range are refused, and never stand for others."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_jax import cli, diffusion
from qdit_jax.calibration import qdit_release_steps
from qdit_jax.models.layers import LabelEmbedder
from qdit_jax.quant import WeightSpec, quantize
from qdit_jax.sampling import check_seed, denoiser, initial_noise
from qdit_jax.testing import realistic_dit

SEED = f"use a number from 0 to {2**32 - 1}"


@pytest.fixture(scope="module")
def checkpoint():
    return qdit.Checkpoint(*realistic_dit(0, hidden_size=32, depth=1, num_heads=2))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, -(2**70)])
def test_seeds_out_of_range_are_refused(checkpoint, seed):
    with pytest.raises(ValueError, match=f"seed={seed} is out of range; {SEED}"):
        check_seed(seed)
    with pytest.raises(ValueError, match=SEED):
        qdit.generate(checkpoint, qdit.ddim(steps=1), [0], seed=seed)
    with pytest.raises(ValueError, match=SEED):
        qdit_release_steps(seed)


def test_seeds_are_whole_numbers():
    assert check_seed(np.int64(7)) == 7
    assert check_seed(2**32 - 1) == 2**32 - 1
    for wrong in (1.0, "1", True, None):
        with pytest.raises(TypeError, match="is not a whole number"):
            check_seed(wrong)


VERBS = {
    "sample": ["ckpt"],
    "calibrate": ["ckpt", "out.npz"],
    "search": ["ckpt", "out"],
    "demo": [],
    "inspect": ["ckpt"],
    "quantize": ["ckpt", "out", "--recipe", "w4a8"],
    "evaluate": ["--out", "out", "ckpt"],
    "verify": ["ckpt", "--against", "full"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("seed", ["4294967296", "18446744073709551616", "-1", "one"])
def test_every_verb_refuses_them(verb, seed, capsys):
    assert cli.main([verb, *VERBS[verb], f"--seed={seed}"]) == 2
    error = capsys.readouterr().err
    assert "--seed" in error
    assert SEED in error or "is not a whole number" in error


@pytest.mark.parametrize("label", [99, -1, 2**31 - 1])
def test_labels_out_of_range_are_refused_before_tracing(checkpoint, label):
    model, params = checkpoint.model, checkpoint.params
    noise, keys = initial_noise(jax.random.key(0), jnp.arange(2), (8, 8, 4))
    labels = jnp.array([1, label], jnp.int32)
    for guidance in (None, 1.5):
        denoise_fn = denoiser(model, params, guidance)
        for fn in (denoise_fn, diffusion.guided_doubled(denoise_fn, 1.5)):
            with pytest.raises(ValueError, match=f"label {label} is out of range; this model"):
                qdit.sample(fn, qdit.ddim(steps=1), noise, labels, keys)
    with pytest.raises(ValueError, match=f"label {label} is out of range"):
        denoiser(model, params, None)(noise, jnp.zeros(2), labels)
    with pytest.raises(ValueError, match="is out of range; rows are 0 to"):
        model.apply({"params": params}, noise, jnp.zeros(2), labels)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_traced_label_out_of_range_is_nan_in_its_own_row(quantized):
    table = np.random.default_rng(0).normal(size=(11, 8)).astype(np.float32)
    leaf = quantize(table.T, WeightSpec(8, 4)) if quantized else table
    embed = jax.jit(
        lambda label: LabelEmbedder(11, 8).apply({"params": {"embedding_table": leaf}}, label)
    )
    found = np.asarray(embed(jnp.array([3, -1, 99, 10], jnp.int32)))
    assert np.isnan(found[1:3]).all()
    np.testing.assert_allclose(found[[0, 3]], table[[3, 10]], atol=0.02)
    sampled = jax.jit(
        lambda label: LabelEmbedder(11, 8).apply({"params": {"embedding_table": leaf}}, label)
    )
    np.testing.assert_array_equal(sampled(jnp.array([3, 10], jnp.int32)), found[[0, 3]])
