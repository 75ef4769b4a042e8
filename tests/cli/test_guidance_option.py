"""`--guidance`: one scale, one per expert, and each network's published one by default."""

from __future__ import annotations

import argparse

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_params

import qdit_jax as qdit
from qdit_jax import diffusion, sampling
from qdit_jax.cli import main
from qdit_jax.cli.guidance_option import guidance_for, guidance_scales
from qdit_jax.models import FAMILIES, build_model

# As the pipelines that were published set them.
PUBLISHED = {
    "dit": 1.5,
    "pixart": 4.5,
    "sd3": 7.0,
    "flux": 3.5,
    "latte": 7.0,
    "latte_t2v": 7.5,
    "stdit": 7.0,
    "stdit3": 7.0,
    "wan": 5.0,
}


def model_of(name, kind=0, **config):
    return build_model(name, {**FAMILIES[name].examples[kind], **config})


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_family_has_its_published_guidance(name):
    assert sampling.own_guidance(model_of(name)) == PUBLISHED[name]
    assert guidance_for(model_of(name), None) == PUBLISHED[name]
    assert guidance_for(model_of(name), 2.0) == 2.0


def test_each_expert_has_its_own():
    model = model_of("wan", 1)
    found = sampling.own_guidance(model)
    assert isinstance(found, diffusion.SteppedScale)
    assert (found.boundary, found.at_or_above, found.below) == (model.boundary, 4.0, 3.0)
    assert sampling.own_guidance(model.clone(expert="low")) == 3.0
    np.testing.assert_array_equal(found(jnp.array([950.0, 949.0])), [4, 3])
    record = sampling.guidance_record(guidance_for(model, (6.0, 2.0)))
    assert record == "6 from timestep 950, 2 below"
    assert sampling.guidance_text(1.5) == "1.5"


def test_a_network_without_a_null_is_not_guided():
    model = model_of("latte", num_classes=0)
    assert sampling.own_guidance(model) is None
    assert guidance_for(model, None) == 1.0
    schnell = model_of("flux", guidance_embed=False)
    assert sampling.own_guidance(schnell) is None


def test_the_default_denoiser_is_guided_as_published():
    """The published scale is a default like any other: it is said by no caller."""
    model = model_of("wan", 1)
    params = random_params(model)
    found = sampling.denoiser(model, params)
    assert sampling.guidance_record(found.scale) == "4 from timestep 950, 3 below"
    dit = model_of("dit")
    assert sampling.denoiser(dit, random_params(dit)).scale == 1.5


def test_shifts_without_a_scheduler_are_the_published_ones():
    assert model_of("wan").flow_shift == 5.0
    assert model_of("wan", 1).flow_shift == 12.0
    levels = [
        np.asarray(
            sampling.checkpoint_sampler(
                qdit.Checkpoint(model_of("wan", kind), {}), 4, **given
            ).table.timestep
        )
        for kind, given in ((0, {}), (0, {"shift": 5.0}), (1, {}), (1, {"shift": 12.0}))
    ]
    np.testing.assert_array_equal(levels[0], levels[1])
    np.testing.assert_array_equal(levels[2], levels[3])
    assert (levels[2][1:] > levels[0][1:]).all()


@pytest.mark.parametrize(
    ("text", "value"), [("4", 4.0), ("4,3", (4.0, 3.0)), (" 2.5, 1 ", (2.5, 1.0))]
)
def test_scales_are_read(text, value):
    assert guidance_scales(text) == value


@pytest.mark.parametrize("text", ["4,3,2", "4,", "x", "4,nan"])
def test_other_text_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        guidance_scales(text)


def test_two_scales_need_two_experts(tmp_path, capsys):
    model = model_of("dit")
    qdit.save(tmp_path / "dit", qdit.Checkpoint(model, random_params(model)))
    command = [
        "sample",
        str(tmp_path / "dit"),
        "--guidance",
        "4,3",
        "--out",
        str(tmp_path / "a.npz"),
    ]
    assert main(command) == 2
    assert (
        "gives 2 scales, one per expert, and this model has one network" in capsys.readouterr().err
    )


def test_inspect_says_the_defaults(tmp_path, capsys):
    model = model_of("wan", 1)
    qdit.save(tmp_path / "wan", qdit.Checkpoint(model, random_params(model)))
    assert main(["inspect", str(tmp_path / "wan")]) == 0
    printed = capsys.readouterr().out
    assert "guidance: 4 from timestep 950, 3 below" in printed
    assert "shift: 12.0" in printed
