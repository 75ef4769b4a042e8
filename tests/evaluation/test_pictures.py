"""Pictures of an evaluation: captions over rows of models, and videos that move."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image
from tiny_models import random_params, tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.evaluation.pictures import NUM_CAPTIONED, captioned
from qdit_jax.models.latte import Latte

VIDEO = Latte(
    input_size=8, num_frames=3, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2
)


def test_a_row_is_a_prompt_and_a_column_a_model():
    images = [np.full((12, 16, 16, 1), value, np.uint8) for value in (0, 100, 255)]
    picture = captioned(images, ["full", "a", "b"], ["first", "second"])
    rows = np.asarray(picture)
    assert picture.width > 3 * 128
    assert picture.height > NUM_CAPTIONED * 128
    middle = rows[90, [70, 205, 340], 0]
    assert middle.tolist() == [0, 100, 255]


def test_videos_are_written_moving_and_stand_on_the_page(tmp_path):
    full = qdit.Checkpoint(VIDEO, random_params(VIDEO))
    small = qdit.quantize(full, "rtn", recipe=qdit.Recipe.preset("w4a8", full, group_size=16))
    found = qdit.evaluate(
        small, against=full, num_samples=2, batch_size=2, sampler=qdit.ddim(2), out=tmp_path / "out"
    )
    assert len(found["paired"]) == 1
    with Image.open(tmp_path / "out/clips.gif") as clip:
        assert clip.n_frames == 3
        assert clip.width > 2 * 128
    assert "data:image/gif;base64," in (tmp_path / "out/report.html").read_text()


def test_there_is_one_prompt_for_each_condition():
    full = tiny_checkpoint()
    small = dataclasses.replace(full)
    with pytest.raises(ValueError, match="2 prompts for no conditions"):
        qdit.evaluate({"a": small}, against=full, num_samples=2, prompts=["one", "two"])
