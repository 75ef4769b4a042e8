"""SD3 and FLUX: sizes and conditions, streams, runs of blocks, folds of segments and of both streams."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import output, random_params

from qdit_jax.calibration import LayerInputs
from qdit_jax.methods import fold_inputs
from qdit_jax.methods.input_transforms import Transform, places, transformed
from qdit_jax.methods.network_inputs import joined_inputs
from qdit_jax.models import FAMILIES, build_model, runs, with_runs

SD3 = {**FAMILIES["sd3"].examples[0], "sample_size": 6, "depth": 3, "dual_blocks": [0, 1]}
FLUX = FAMILIES["flux"].examples[0]


def network(family, **changes):
    model = build_model(family, {**(SD3 if family == "sd3" else FLUX), **changes})
    return model, random_params(model)


def inputs_of(model, batch=2, size=None, seed=0):
    rng = np.random.default_rng(seed)
    shape = model.sample_shape() if size is None else (*size, model.in_channels)
    condition = {
        name: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)
        for name, leaf in model.example_condition(batch).items()
    }
    x = jnp.asarray(rng.standard_normal((batch, *shape)), jnp.float32)
    return x, jnp.linspace(0.2, 0.9, batch) * model.flow_times[0], condition


def call(params, inputs, *, model):
    return output(model, params, *inputs)


def relative(one, other):
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))


@pytest.fixture(scope="module")
def sd3():
    return network("sd3")


@pytest.fixture(scope="module")
def flux():
    return network("flux")


def test_the_middle_of_the_table_is_used(sd3):
    model, params = sd3
    inputs = inputs_of(model, size=(6, 4))  # 3 x 2 patches of a table of 5 x 5
    out = call(params, inputs, model=model)
    table = np.asarray(params["pos_embed"]).reshape(5, 5, -1)
    used = np.zeros((5, 5, 1))
    used[1:4, 1:3] = 1
    for kept, same in ((used, True), (1 - used, False)):
        changed = {**params, "pos_embed": jnp.asarray((table * kept).reshape(1, 25, -1))}
        assert bool((call(changed, inputs, model=model) == out).all()) is same


@pytest.mark.parametrize(
    ("family", "size", "told"),
    [
        ("sd3", (12, 4), "at most 10 rows and columns"),
        ("sd3", (5, 4), "divisible by 2"),
        ("flux", (5, 4), "even"),
    ],
)
def test_latents_that_do_not_fit_are_refused(family, size, told):
    model, params = network(family)
    with pytest.raises(ValueError, match=told):
        model.apply({"params": params}, *inputs_of(model, size=size))


@pytest.mark.parametrize(
    ("family", "fields", "told"),
    [
        ("sd3", {"dual_blocks": [7]}, r"dual_blocks=\(7,\) are not among the 3 blocks"),
        ("sd3", {"num_heads": 3}, "divisible by num_heads=3"),
        ("flux", {"rope_axes": [2, 2, 2]}, r"rope_axes=\(2, 2, 2\) must add up to the 8 channels"),
        ("flux", {"rope_axes": [4, 4]}, "three numbers"),
    ],
)
def test_fields_that_do_not_fit_are_refused(family, fields, told):
    model = build_model(family, {**(SD3 if family == "sd3" else FLUX), **fields})
    with pytest.raises(ValueError, match=told):
        jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())


def test_conditions_that_do_not_fit_are_named(flux):
    model, _ = flux
    condition = inputs_of(model)[2]
    schnell, _ = network("flux", guidance_embed=False)
    bad = [
        (model, {"guidance": jnp.ones((2, 1))}, r"guidance has shape \(2, 1\); .* takes \[B\]"),
        (model, {"pooled": jnp.ones((2, 5))}, r"pooled has shape \(2, 5\); .* takes \[B, 6\]"),
        (model, {"pooled": jnp.ones((3, 6))}, "give one per sample of each"),
        (model, {"text": condition["text"] * jnp.nan}, "text has values that are NaN or infinite"),
        (model, {"text_ids": jnp.ones((2, 5, 2))}, r"takes \[B, any, 3\]"),
        (schnell, {}, "embeds no guidance"),
    ]
    for network_, changes, told in bad:
        with pytest.raises(ValueError, match=told):
            network_.check_condition({**condition, **changes})


def test_nobody_reads_the_last_queries_of_the_text(sd3):
    model, params = sd3
    inputs = inputs_of(model)
    flat = flatten_dict(params, sep="/")
    path = "joint_blocks_2/context_block/attn/qkv/kernel"
    kernel = flat[path]
    for columns, same in ((slice(0, 16), True), (slice(16, 32), False), (slice(32, 48), False)):
        changed = unflatten_dict({**flat, path: kernel.at[:, columns].add(1.0)}, sep="/")
        out = call(changed, inputs, model=model)
        assert bool((out == call(params, inputs, model=model)).all()) is same


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_runs_of_equal_blocks_are_the_same_function(family, monkeypatch):
    monkeypatch.setattr(runs, "LEAST", 2)
    deep = {"depth": 5} if family == "sd3" else {}
    model, _ = network(family, **deep)
    params = random_params(model, scale=0.1)
    scanned = with_runs(params, FAMILIES[family].block)
    found = {"sd3": ["joint_blocks_0", "joint_blocks_2"], "flux": ["single_blocks_0"]}[family]
    assert sorted(scanned["block_runs"]) == found
    inputs = inputs_of(model)
    apart, together = (call(p, inputs, model=model) for p in (params, scanned))
    assert relative(together, apart) < 1e-5


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_sixteen_bits_are_close(family):
    model, params = network(family)
    inputs = inputs_of(model)
    narrow = call(params, inputs, model=model.clone(dtype="bfloat16"))
    assert narrow.dtype == jnp.float32
    assert 0 < relative(narrow, call(params, inputs, model=model)) < 0.05


def random_map(width, seed=0):
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(-1, 1, width)), rng.normal(0, 1, width)


@pytest.mark.parametrize(
    ("family", "pair"),
    [
        ("sd3", ("joint_blocks_0/x_block/attn/proj", "joint_blocks_0/context_block/attn/proj")),
        ("flux", ("double_blocks_0/img_attn/proj", "double_blocks_0/txt_attn/proj")),
    ],
)
def test_both_outputs_of_a_joint_attention_share_a_map(family, pair):
    model, params = network(family)
    inputs = inputs_of(model)
    scale, shift = random_map(16)
    folded = fold_inputs(params, scale={pair[0]: scale}, shift={pair[0]: shift})
    again = fold_inputs(params, scale=dict.fromkeys(pair, scale), shift=dict.fromkeys(pair, shift))
    jax.tree.map(np.testing.assert_array_equal, folded, again)
    flat, before = (flatten_dict(tree, sep="/") for tree in (folded, params))
    for path in pair:
        changed = scale[:, None] * np.asarray(before[f"{path}/kernel"])
        np.testing.assert_allclose(flat[f"{path}/kernel"], changed, rtol=1e-5)
    assert relative(call(folded, inputs, model=model), call(params, inputs, model=model)) < 1e-5
    with pytest.raises(ValueError, match="read the same input; give them the same"):
        fold_inputs(params, scale={pair[0]: scale, pair[1]: 2 * scale})
    [place] = places(params, pair)
    assert place.layers == pair
    assert place.folded


def test_a_dual_block_has_rows_of_its_own_for_the_second_attention(sd3):
    _, params = sd3
    scale, shift = random_map(16)
    path = "joint_blocks_1/x_block/attn2/qkv"
    folded = fold_inputs(params, scale={path: scale}, shift={path: shift})
    before, after = (
        np.asarray(tree["joint_blocks_1"]["x_block"]["adaLN_modulation"]["bias"]).reshape(9, 16)
        for tree in (params, folded)
    )
    assert (before[:6] == after[:6]).all()
    np.testing.assert_allclose(after[6], (before[6] - shift) / scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after[7], (before[7] + 1) / scale - 1, rtol=1e-4, atol=1e-5)
    assert (before[8] == after[8]).all()


def test_a_fold_reaches_the_attention_channels_of_the_last_layer_of_a_single_block(flux):
    model, params = flux
    inputs = inputs_of(model)
    row, path = FAMILIES["flux"], "single_blocks_1/linear2"
    shape = params["single_blocks_1"]["linear2"]["kernel"].shape
    assert shape == (80, 16)
    covered = row.covered(path, flatten_dict(params, sep="/"))
    for reached in covered:
        assert np.flatnonzero(reached).tolist() == list(range(16))
    assert row.chunk("single_blocks_1/linear1", "v", (16, 112)) == slice(32, 48)
    assert row.chunk("single_blocks_1/linear1", "mlp", (16, 112)) == slice(48, 112)
    scale, shift = random_map(16)
    wide, moved = np.append(scale, np.ones(64)), np.append(shift, np.zeros(64))
    folded = fold_inputs(params, scale={path: wide}, shift={path: moved})
    assert relative(call(folded, inputs, model=model), call(params, inputs, model=model)) < 1e-5
    bias = [np.asarray(p["single_blocks_1"]["linear1"]["bias"]) for p in (params, folded)]
    np.testing.assert_allclose(
        bias[1][32:48], (bias[0][32:48] - shift) / scale, rtol=1e-4, atol=1e-5
    )
    assert (np.delete(bias[0], np.s_[32:48]) == np.delete(bias[1], np.s_[32:48])).all()
    for wrong in ({"scale": {path: np.full(80, 2.0)}}, {"shift": {path: np.ones(80)}}):
        with pytest.raises(ValueError, match="of input channels 0 to 15 only"):
            fold_inputs(params, **wrong)
    # A map of all its channels, behind a GELU as well, works at run time.
    [place] = places(params, [path])
    assert not place.folded
    mapped = transformed(params, place, Transform(np.exp(random_map(80, 1)[1]).astype(np.float32)))
    assert "input_map" in mapped["single_blocks_1"]["linear2"]
    assert relative(call(mapped, inputs, model=model), call(params, inputs, model=model)) < 1e-5


def test_layers_of_one_map_with_different_rows_are_fitted_to_the_rows_of_all():
    def inputs(rows):
        rows = np.asarray(rows, np.float32)
        return LayerInputs(rows.min(0), rows.max(0), np.abs(rows).mean(0), rows)

    one, other = inputs([[1, -2], [3, 0]]), inputs([[-5, 4]])
    assert joined_inputs([one, inputs(one.rows)]) is one
    both = joined_inputs([one, other])
    assert both.low.tolist() == [-5, -2]
    assert both.high.tolist() == [3, 4]
    assert both.absmax.tolist() == [5, 4]
    assert both.rows.tolist() == [[1, -2], [3, 0], [-5, 4]]
