"""What was named after the release's authors is found under its earlier name too, with a warning."""

from __future__ import annotations

import json

import pytest

from qdit_jax import calibration, methods, ptq, quant
from qdit_jax.cli.quantize_options import range_named
from qdit_jax.quant import ranges
from qdit_jax.recipes import Recipe

RENAMED = [
    (ranges, "authors", "qdit_release"),
    (ranges, "authors_mse", "qdit_release_mse"),
    (ranges, "authors_gptq", "qdit_release_gptq"),
    (quant, "gptq_authors", "qdit_release_gptq"),
    (ptq, "by_block_authors", "by_block_qdit_release"),
    (calibration, "authors_steps", "qdit_release_steps"),
    (methods, "authors_items", "qdit_release_items"),
]


@pytest.mark.parametrize(("module", "earlier", "present"), RENAMED)
def test_an_earlier_name_gives_the_present_one_and_warns(module, earlier, present):
    with pytest.warns(DeprecationWarning, match=f"{earlier} is called {present} now"):
        found = getattr(module, earlier)
    assert found is getattr(module, present)
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        module.other  # noqa: B018


@pytest.mark.parametrize("earlier", ["authors", "authors_mse", "authors_gptq"])
def test_a_recipe_with_an_earlier_name_is_read(earlier):
    present = earlier.replace("authors", "qdit_release")
    rule = getattr(ranges, present)
    recipe = Recipe.preset("w4a8", group_size=32, range_fn=rule)
    text = json.dumps(recipe.to_json())
    assert f'"{present}"' in text
    assert Recipe.from_json(json.loads(text.replace(present, earlier))) == recipe
    assert ranges.from_json(earlier) == getattr(ranges, present)


@pytest.mark.parametrize("earlier", ["authors", "authors-mse", "authors-gptq"])
def test_a_range_option_by_its_earlier_name_says_the_present_one(earlier, capsys):
    present = earlier.replace("authors", "qdit-release")
    assert range_named(earlier) == range_named(present) == range_named(present.replace("-", "_"))
    assert f"note: {earlier} is called {present} now." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("gptq_authors", "qdit_release_gptq"),
        ("gptq-authors", "qdit_release_gptq"),
        ("Q-DiT", "qdit"),
        ("q-dit-release", "qdit_release"),
        ("ViDiT-Q", "vidit_q"),
        ("SVDQuant", "svdquant"),
        ("G4W-P4A", "g4w_p4a"),
    ],
)
def test_a_method_is_found_as_people_write_it(written, name):
    assert methods.method_named(written).name == name
    assert methods.present_name("gtpq") == "gtpq"
