"""FVD's I3D network: names, its input, the score, and equality with a torch definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qdit_jax as qdit
from qdit_convert import convert
from qdit_convert.i3d import convolutions
from qdit_jax.metrics import label
from qdit_jax.models import I3D
from qdit_jax.models.i3d import video_input


def random_state(seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random weights in the port's names, whose activations keep their size."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (before, after, size) in convolutions().items():
        shape = (after, before, size, size, size)
        found[f"{name}.conv3d.weight"] = rng.normal(0, (2 / (before * size**3)) ** 0.5, shape)
        found[f"{name}.bn.weight"] = rng.uniform(0.5, 1.5, after)
        found[f"{name}.bn.bias"] = rng.normal(0, 0.2, after)
        found[f"{name}.bn.running_mean"] = rng.normal(0, 0.2, after)
        found[f"{name}.bn.running_var"] = rng.uniform(0.5, 1.5, after)
    found["logits.conv3d.weight"] = rng.normal(0, 0.03, (400, 1024, 1, 1, 1))
    found["logits.conv3d.bias"] = rng.normal(0, 0.2, 400)
    return {name: array.astype(np.float32) for name, array in found.items()}


def test_sizes_are_the_published_ones():
    x = jax.ShapeDtypeStruct((2, 16, 224, 224, 3), jnp.float32)
    outputs, variables = jax.eval_shape(I3D().init_with_output, jax.random.key(0), x)
    assert outputs["pool"].shape == (2, 400)
    params = variables["params"]
    assert params["Conv3d_1a_7x7"]["conv3d"]["kernel"].shape == (7, 7, 7, 3, 64)
    assert params["Mixed_5c"]["b1b"]["conv3d"]["kernel"].shape == (3, 3, 3, 192, 384)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 12_711_824
    with pytest.raises(ValueError, match="9 frames or more"):
        video_input(np.zeros((1, 8, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="1 or 3"):
        video_input(np.zeros((1, 9, 16, 16, 4), np.uint8))


def test_the_input_spans_its_range_and_gray_is_repeated():
    videos = np.array([0, 255], np.uint8)[None, None, None, :, None].repeat(9, 1).repeat(4, 2)
    found = np.asarray(video_input(videos))
    assert found.shape == (1, 9, 224, 224, 3)
    np.testing.assert_allclose([found.min(), found.max()], [-1, 1], atol=1e-6)


def test_only_its_own_distance_is_called_fvd():
    assert label("frechet_distance", "i3d") == "FVD"
    assert label("kernel_distance", "i3d") == "kernel distance (i3d features)"
    assert label("frechet_distance", "inception") == "FID"


@pytest.mark.slow
def test_random_network_equals_torch_and_scores_videos(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from torch_i3d import logits_of

    state = {name: torch.tensor(array) for name, array in random_state().items()}
    torch.save(state, tmp_path / "i3d_pretrained_400.pt")
    checkpoint = convert(tmp_path / "i3d_pretrained_400.pt", tmp_path / "i3d")
    assert isinstance(checkpoint.model, I3D)
    videos = np.random.default_rng(2).integers(0, 256, (2, 10, 40, 48, 3), np.uint8)
    x = video_input(videos)
    with torch.no_grad():
        expected = logits_of(state, torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())).numpy()
    found = jax.jit(I3D().apply)({"params": checkpoint.params}, x)["pool"]
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected, atol=5e-5 * np.abs(expected).max())

    names = [str(tmp_path / name) for name in ("real.npz", "made.npz")]
    for seed, name in enumerate(names):
        clips = np.random.default_rng(seed).integers(0, 256, (4, 9, 8, 8, 1), np.uint8)
        np.savez(name, clips)
    command = ["evaluate", "--samples", names[1], "--reference", names[0], "--out", "scored"]
    options = ["--features", "i3d", str(tmp_path / "i3d"), "--min-samples", "2"]
    command[command.index("scored")] = str(tmp_path / "scored")
    from qdit_jax.cli import main

    assert main([*command, *options]) == 0, capsys.readouterr().err
    assert "FVD" in capsys.readouterr().out
    assert qdit.load(tmp_path / "i3d").model == I3D()
