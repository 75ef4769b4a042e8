"""Converted checkpoints give the original networks' recorded outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_samples import flat

from qdit_convert import read_model
from qdit_convert.reading import to_checkpoint


def output(read, x, *inputs, **settings):
    """Returns the network's output for NCHW input, as NCHW."""
    checkpoint = to_checkpoint(read)
    run = jax.jit(
        lambda params, *given: checkpoint.model.apply({"params": params}, *given, **settings)
    )
    out = run(checkpoint.params, jnp.asarray(x.transpose(0, 2, 3, 1)), *map(jnp.asarray, inputs))
    if isinstance(out, tuple):
        return tuple(np.asarray(o).transpose(0, 3, 1, 2) for o in out)
    return np.asarray(out).transpose(0, 3, 1, 2)


def check(found, expected):
    assert np.abs(found - expected).max() <= 2e-4 * (1 + np.abs(expected).max())


@pytest.mark.parametrize(
    ("file", "record", "key", "settings"),
    [
        ("dit_A.pt", "dit_A_forward.npz", "out", {"num_heads": 4}),
        ("dit_B_ema.pt", "dit_B_forward.npz", "out", {"num_heads": 2}),
        ("dit_tiny_train_ckpt.pt", "dit_tiny_train_ckpt_forward.npz", "out_ema", {"num_heads": 2}),
        (
            "dit_tiny_train_ckpt.pt",
            "dit_tiny_train_ckpt_forward.npz",
            "out_model",
            {"num_heads": 2, "weights": "model"},
        ),
        ("dit_diffusers", "dit_diffusers_io.npz", "out", {}),
    ],
)
def test_a_converted_dit_gives_the_recorded_output(golden, file, record, key, settings):
    recorded = np.load(golden(record))
    read = read_model(golden(file), **settings)
    found = output(read, recorded["x"], recorded["t"], recorded["y"])
    check(found, recorded[key])


@pytest.mark.parametrize("file", ["vae", "vae_legacy_keys"])
def test_a_converted_vae_gives_the_recorded_outputs(golden, file):
    recorded = np.load(golden("vae_io.npz"))
    read = read_model(golden(file))
    check(output(read, recorded["z"], method="decode"), recorded["decoded"])
    mean, logvar = output(read, recorded["image"], method="encode")
    check(mean, recorded["enc_mean"])
    check(logvar, recorded["enc_logvar"])


def test_old_attention_names_give_the_same_tree(golden):
    new, old = (flat(read_model(golden(name)).params) for name in ("vae", "vae_legacy_keys"))
    assert set(new) == set(old)
    assert all((new[path] == old[path]).all() for path in new)
