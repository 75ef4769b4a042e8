"""Errors of single frames and between frames, and folders of clips."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qdit_jax import metrics
from qdit_jax.metrics.clip_folder import folder_batches


def clips(seed=0, shape=(3, 5, 4, 6, 3)):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


def test_the_error_of_a_frame_is_that_of_the_frame_alone():
    x, y = clips(0), clips(1)
    by_frame = metrics.frame_snr_db(x, y)
    assert by_frame.shape == (3, 5)
    for t in range(5):
        np.testing.assert_allclose(by_frame[:, t], metrics.signal_to_noise_db(x[:, t], y[:, t]))
    one = x.copy()
    one[1, 3] += 0.5
    found = metrics.frame_snr_db(x, one)
    assert np.unravel_index(found.argmin(), found.shape) == (1, 3)
    assert (np.delete(found.ravel(), 1 * 5 + 3) == 200).all()


def test_flicker_is_what_is_added_between_frames():
    x = clips(0)
    np.testing.assert_allclose(metrics.flicker_error(x, x), 0)
    np.testing.assert_allclose(metrics.flicker_error(x, x + 0.3), 0, atol=1e-12)  # stands still
    blinking = x + 0.1 * (-1.0) ** np.arange(5)[None, :, None, None, None]
    np.testing.assert_allclose(metrics.flicker_error(x, blinking), 0.2 / 2)
    np.testing.assert_allclose(metrics.flicker_error(255 * x, 255 * blinking, peak=510), 0.2 / 2)


def test_temporal_flickering_is_that_of_8_bit_frames():
    frames = np.random.default_rng(2).integers(0, 256, (2, 4, 5, 6, 3)).astype(np.float32)
    expected = []
    for clip in frames:  # the published form: the mean over pairs of the pairs' means
        pairs = [np.abs(clip[i] - clip[i + 1]).mean() for i in range(len(clip) - 1)]
        expected.append((255.0 - np.mean(pairs)) / 255.0)
    np.testing.assert_allclose(metrics.temporal_flickering(frames, peak=255), expected, rtol=1e-6)
    np.testing.assert_allclose(metrics.temporal_flickering(frames / 127.5 - 1), expected, rtol=1e-6)
    assert (metrics.temporal_flickering(np.ones((2, 3, 4, 4, 1))) == 1).all()


@pytest.mark.parametrize("fn", [metrics.flicker_error, metrics.frame_snr_db])
def test_what_is_no_clip_is_refused(fn):
    with pytest.raises(ValueError, match=r"clips have shape \(3, 4, 6, 3\)"):
        fn(clips()[:, 0], clips()[:, 0])
    with pytest.raises(ValueError, match="cannot be paired"):
        fn(clips(), clips()[:, :4])


def test_one_frame_does_not_flicker():
    with pytest.raises(ValueError, match="with 2 frames or more"):
        metrics.temporal_flickering(clips()[:, :1])


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with a .gif, an .npz of two clips, and a text beside them."""
    made = np.random.default_rng(3).integers(0, 256, (3, 4, 8, 8, 3), np.uint8)
    frames = [Image.fromarray(frame) for frame in made[0]]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.savez(tmp_path / "b.npz", made[1:])
    (tmp_path / "notes.txt").write_text("not a clip")
    return tmp_path, made


def test_a_folder_of_clips_is_a_reference(folder):
    path, made = folder
    assert metrics.image_shape(path) == (3, 4, 8, 8, 3)
    batches = list(metrics.image_batches(path, 2))
    assert [len(batch) for batch in batches] == [2, 1]
    np.testing.assert_array_equal(np.concatenate(batches)[1:], made[1:])
    reference = metrics.read_reference(path)
    assert reference.has_images
    assert reference.pool is None


def test_an_mp4_is_read_where_its_package_is_installed(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    frames = np.full((9, 16, 16, 3), 200, np.uint8)
    with imageio.get_writer(tmp_path / "a.mp4", format="FFMPEG", fps=8, macro_block_size=1) as out:
        for frame in frames:
            out.append_data(frame)
    (batch,) = metrics.image_batches(tmp_path, 4)
    assert batch.shape == (1, 9, 16, 16, 3)
    assert np.abs(batch.astype(int) - 200).max() < 8


def test_clips_of_other_sizes_and_empty_folders_are_named(folder, tmp_path):
    path, made = folder
    np.savez(path / "c.npz", made[:, :3])
    with pytest.raises(ValueError, match=r"c.npz is a clip of \(3, 8, 8, 3\) and the first one is"):
        list(folder_batches(path, 2))
    np.savez(path / "c.npz", made / 255)
    with pytest.raises(ValueError, match=r"c\.npz holds float64"):
        list(folder_batches(path, 2))
    (path / "d.gif").write_bytes(b"no picture")
    (path / "c.npz").unlink()
    with pytest.raises(ValueError, match=r"d\.gif cannot be read as a clip"):
        list(folder_batches(path, 2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no clip"):
        metrics.image_shape(tmp_path / "empty")
