"""A name that stands twice in a file of ours is refused: readers differ in which one they take."""

from __future__ import annotations

import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.errors import UserError


def test_a_recipe_that_says_a_name_twice_is_refused(tmp_path):
    file = tmp_path / "recipe.json"
    rule = '{"layers": ".*", "weight": {"bits": 8, "bits": 2, "group_size": 8}}'
    file.write_text(f'{{"format_version": 1, "name": "m", "rules": [{rule}]}}')
    with pytest.raises(ValueError, match=r"recipe\.json .*holds 'bits' twice; remove the entry"):
        qdit.Recipe.from_json(file)


def test_a_checkpoint_that_says_a_name_twice_is_refused(tmp_path):
    qdit.save(tmp_path / "c", tiny_checkpoint())
    file = tmp_path / "c" / "model.json"
    file.write_text(file.read_text().replace('"num_heads":', '"num_heads": 4, "num_heads":', 1))
    with pytest.raises(UserError, match=r"model\.json .*holds 'num_heads' twice"):
        qdit.load(tmp_path / "c")
