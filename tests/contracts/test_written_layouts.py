"""Every layout that is written: a quantized network's file, read again, has the same codes and scales."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_layouts import WRITTEN, planned, state_of

import qdit_jax as qdit
from qdit_convert import export, read_model
from qdit_convert.inverse import told_of, written_in
from qdit_convert.plan import build_params
from qdit_convert.reading import to_checkpoint
from qdit_jax.errors import UserError
from qdit_jax.models import build_model, config_of
from qdit_jax.quant import QTensor

# What these examples' config.json says, which a single file does not: as readers take it.
PUBLISHED = {"wan": {"text_length": 512}, "stdit3": {"input_sq_size": 512}}
LUT = qdit.Recipe.preset(
    "w4a8",
    layers="part:blocks",
    weight_format="lut4_e4m3",
    group_size=16,
    act_group_size=0,
    act_symmetric=True,
)
every_written = pytest.mark.parametrize("layout", WRITTEN, ids=lambda layout: layout.name)


def checkpoint_of(layout):
    """Returns the network of a layout's example."""
    state, plan = planned(layout, state_of(layout))
    params = build_params(plan, state.tensors, None, lambda leaf: None)
    model = build_model(plan.family, {**plan.config, **PUBLISHED.get(layout.name, {})})
    return qdit.Checkpoint(model, jax.tree.map(jax.numpy.asarray, params))


def read_again(layout, checkpoint, path):
    """Returns the checkpoint in a written file."""
    told = dataclasses.asdict(told_of(layout, config_of(checkpoint.model)))
    told = {name: value for name, value in told.items() if value is not None}
    return to_checkpoint(read_model(path, family=layout.families[0], **told))


def check_equal(ours, theirs):
    """Checks that both have the same arrays: codes, scales, and what is not quantized."""
    ours, theirs = (flatten_dict(one.params, sep="/") for one in (ours, theirs))
    assert set(ours) == set(theirs)
    for path, leaf in ours.items():
        if isinstance(leaf, QTensor):
            assert (leaf.bits, leaf.fmt) == (theirs[path].bits, theirs[path].fmt)
            np.testing.assert_array_equal(leaf.codes, theirs[path].codes, path)
            np.testing.assert_array_equal(
                qdit.dequantize(leaf), qdit.dequantize(theirs[path]), path
            )
        elif hasattr(leaf, "shape"):
            np.testing.assert_array_equal(leaf, theirs[path], path)


@every_written
def test_int8_goes_out_and_comes_back(layout, tmp_path):
    checkpoint = qdit.quantize(checkpoint_of(layout), "rtn", "w8a8-fast")
    assert written_in(checkpoint.model)[0] is layout
    written = export(checkpoint, tmp_path / "out.safetensors", format="int8_tensorwise")
    assert written.layout == layout.title
    again = read_again(layout, checkpoint, tmp_path / "out.safetensors")
    check_equal(checkpoint, again)
    assert config_of(again.model) == config_of(checkpoint.model)


@pytest.mark.parametrize("name", ["nvfp4", "asym_w4a8_int8"])
@every_written
def test_four_bits_go_out_and_come_back_where_the_widths_allow_it(layout, name, tmp_path):
    checkpoint = checkpoint_of(layout)
    if name == "nvfp4":
        recipe = qdit.Recipe.preset("w4a16", layers="part:blocks", weight_format="nvfp4")
        quantized = qdit.quantize(checkpoint, "rtn", recipe)
    else:
        quantized = qdit.quantize(checkpoint, "convrot", LUT)
    out = tmp_path / "out.safetensors"
    kernels = [x for x in flatten_dict(quantized.params).values() if isinstance(x, QTensor)]
    if any(kernel.shape[0] % 16 for kernel in kernels):
        with pytest.raises(UserError, match=f"which the format {name} cannot hold"):
            export(quantized, out, format=name)
        return
    export(quantized, out, format=name)
    check_equal(quantized, read_again(layout, quantized, out))


def test_a_network_that_a_file_cannot_say_is_refused_by_the_field():
    for layout in WRITTEN:
        if layout.name == "wan":
            model = checkpoint_of(layout).model.clone(eps=1e-5)
            with pytest.raises(
                UserError, match="the network has eps=1e-05, which readers of Wan in"
            ):
                written_in(model)
