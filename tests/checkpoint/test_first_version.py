"""A checkpoint that this project's first published version (2026-11-23) wrote still loads."""

from __future__ import annotations

import tarfile

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import output

import qdit_jax as qdit


@pytest.fixture(scope="module")
def first(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    with tarfile.open(golden("first_version.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_it_loads_and_computes_what_it_computed(first, name):
    checkpoint = qdit.load(first / name)
    assert checkpoint.recipe is not None
    assert checkpoint.recipe.name.startswith("w4a8")
    assert isinstance(checkpoint.params["blocks_0"]["attn"]["qkv"]["kernel"], qdit.QTensor)
    with np.load(first / "io.npz") as recorded:
        inputs = (jnp.asarray(recorded[name]) for name in ("x", "t", "y"))
        out = output(checkpoint.model, checkpoint.params, *inputs)
        np.testing.assert_allclose(out, recorded["out"], rtol=1e-5, atol=1e-6)
