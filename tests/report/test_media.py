"""Pictures and archives: the published rounding, layout, atomic writes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qdit_jax.report import media


def test_rounding_clamps_truncates_and_survives_bad_numbers():
    x = np.array([-3.0, -1.0, -0.99, 0.0, 0.003, 0.999, 1.0, 7.0, np.nan, np.inf]).reshape(
        10, 1, 1, 1
    )
    assert media.to_uint8(x).ravel().tolist() == [0, 0, 1, 128, 128, 255, 255, 255, 0, 255]
    same = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    assert (media.to_uint8(same) == same).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_images_row_by_row(tmp_path, channels):
    images = np.linspace(-1, 1, 5).reshape(5, 1, 1, 1) * np.ones((5, 4, 6, channels))
    media.save_grid(tmp_path / "grid.png", images, columns=3, scale=2)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (2 * (8 + media.GAP) + media.GAP, 3 * (12 + media.GAP) + media.GAP, 3)
    assert (picture[media.GAP : media.GAP + 8, media.GAP : media.GAP + 12] == 0).all()
    second_row = picture[12 : 12 + 8, media.GAP : media.GAP + 12]
    assert (second_row == media.to_uint8(images[3])[0, 0, 0]).all()
    assert (picture[12:, -12:] == 255).all()  # the absent sixth image


def test_labels_take_a_strip_above_and_long_ones_are_cut(tmp_path):
    images = np.zeros((2, 16, 16, 1))
    plain = media.image_grid(images)
    labeled = media.image_grid(images, labels=["7", "a label much too long for sixteen pixels"])
    assert labeled.height > plain.height
    assert labeled.width == plain.width
    assert len(np.unique(np.asarray(labeled))) > len(np.unique(np.asarray(plain)))


def test_side_by_side_joins_grids_of_equal_shape():
    images = np.zeros((4, 8, 8, 3))
    joined = media.side_by_side({"full precision": images, "w4a8": images}, columns=2)
    one = media.image_grid(images, columns=2)
    assert joined.width > 2 * one.width
    assert joined.height > one.height


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="unknown file extension"):
        media.save_grid(tmp_path / "grid.nonsense", np.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="give one per image"):
        media.save_grid(path, np.zeros((2, 4, 4, 3)), labels=["a"])
    with pytest.raises(ValueError, match="give at least one as"):
        media.save_grid(path, np.zeros((2, 4, 4, 2)))
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    assert path.read_bytes() == b"old"
