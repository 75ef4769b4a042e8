"""The contract of every file layout in the table, on a small file made of its own example."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from qdit_convert import read_model
from qdit_convert.choices import Choices
from qdit_convert.families import check_options, find_layout
from qdit_convert.inverse import file_shapes
from qdit_convert.joint import swapped, swapped_linear
from qdit_convert.layouts import LAYOUTS, NAMINGS
from qdit_convert.names import select_network
from qdit_convert.plan import build_params, check_plan, convolution, convolution3d, linear, same
from qdit_convert.reading import to_checkpoint
from qdit_convert.tensors import StateDict, StoredTensor
from qdit_convert.video import frame_convolution
from qdit_convert.wan_vae import vector
from qdit_jax.errors import UserError
from qdit_jax.models import FAMILIES, abstract_params, build_model, config_of

# What turns a leaf back into the tensor of its file. A layout with another transform has no round
# trip in this file, until its inverse is here.
INVERSES = {
    same: lambda leaf: leaf,
    linear: lambda leaf: leaf.T,
    convolution: lambda leaf: leaf.transpose(3, 2, 0, 1),
    swapped: swapped,
    swapped_linear: lambda leaf: swapped(leaf.T),
    frame_convolution: lambda leaf: leaf.transpose(3, 2, 0, 1)[:, :, None],
    vector: lambda leaf: leaf,
    convolution3d: lambda leaf: leaf.transpose(4, 3, 0, 1, 2),
}
OPTIONS = {
    "model": "DiT-XL/2",
    "num_heads": 2,
    "num_classes": 10,
    "input_size": 4,
    "noise_time": 1,
    "scaling_factor": 0.5,
    "shift_factor": 0.1,
    "rope_axes": (2, 4, 2),
    "interpolation_scale": 2.0,
    "space_scale": 0.5,
    "time_scale": 1.0,
}
# Stored tables that are computed where they are absent.
COMPUTED = {("pixart", "pos_embed")}
# Fields of networks with a number for every block.
BY_BLOCK = ("kv_compression",)
# Tensors that alone tell a size, the channels of a text: a wider one is of another network.
ALONE = (
    "context_embedder.weight",
    "txt_in.weight",
    "vector_in.in_layer.weight",
    "y_embedder.mlp.0.weight",
    "time_text_embed.text_embedder.linear_1.weight",
)
ALONE_OF = {"sana": "y_embedder.y_proj.fc1.weight"}  # of one layout, where others hold a second
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


@cache
def arrays_of(layout):
    """Returns the tensors of an example, copies equal to what they copy."""
    rng = np.random.default_rng(0)
    found = {}
    for leaf in layout.example().leaves:
        for key in leaf.sources:
            shape = leaf.expected[key][0]
            found[key] = (0.1 * rng.standard_normal(shape)).astype(np.float32)
        found |= {key: found[leaf.sources[0]] for key in leaf.copies}
    return found


def state_of(layout, arrays=None, prefix="", on_read=lambda key: None):
    """Returns the file of an example as a reader hands it over."""
    arrays = arrays_of(layout) if arrays is None else arrays

    def stored(key, array):
        def read():
            on_read(key)
            return array

        return StoredTensor(array.shape, array.dtype, read)

    tensors = {f"{prefix}{key}": stored(key, array) for key, array in arrays.items()}
    return StateDict("example", tensors, hints=dict(layout.example().hints))


def planned(layout, state, **choices):
    """Returns the renamed tensors and the checked plan of a file of this layout."""
    example = layout.example()
    state = layout.rename(state)
    plan = layout.plan(state, Choices(**{**example.choices, **choices}), example.config)
    check_plan(plan, state)
    return state, plan


def complaint(layout, arrays):
    """Returns what is said of a file that is not as it should be, in the file's own names."""
    state = layout.rename(state_of(layout, arrays))
    example = layout.example()
    with pytest.raises(UserError) as caught:
        check_plan(layout.plan(state, Choices(**example.choices), example.config), state)
    return layout.own_names(str(caught.value), state)


@every_layout
def test_a_row_is_complete(layout):
    assert [row.name for row in LAYOUTS].count(layout.name) == 1
    assert [row.title for row in LAYOUTS].count(layout.title) == 1
    assert layout.families
    assert set(layout.options) <= set(OPTIONS)
    assert len(layout.example().leaves) > 5


@every_layout
def test_an_example_is_told_from_its_names_and_is_of_no_other_layout(layout):
    state = state_of(layout)
    assert find_layout(state) is layout
    assert find_layout(select_network(state)) is layout
    assert find_layout(select_network(state_of(layout, prefix="module.net."))) is layout
    keys = list(arrays_of(layout))
    assert all(layout.names.match(key) for key in keys)
    for other in NAMINGS:
        if other.names is not layout.names:
            # Networks share names; those of one layout must still be told by most of its own.
            assert sum(bool(other.names.match(key)) for key in keys) < 0.95 * len(keys)
    asked = find_layout(StateDict("example", state.tensors), layout.families[0])
    assert asked is layout
    for family in {name for row in LAYOUTS for name in row.families} - served(layout):
        with pytest.raises(UserError, match=f"not of family {family}"):
            find_layout(state, family)


def served(layout):
    return {name for row in LAYOUTS if row.names is layout.names for name in row.families}


@every_layout
def test_every_tensor_is_read_once_and_every_leaf_is_of_the_network(layout):
    reads = Counter()
    state, plan = planned(layout, state_of(layout, on_read=lambda key: reads.update([key])))
    used = Counter(key for leaf in plan.leaves for key in (*leaf.sources, *leaf.copies))
    assert set(used) == set(state.tensors)
    assert set(used.values()) == {1}
    params = flatten_dict(build_params(plan, state.tensors, None, lambda leaf: None), sep="/")
    assert set(reads) == set(arrays_of(layout))
    assert set(reads.values()) == {1}
    assert plan.family in FAMILIES
    wanted = abstract_params(build_model(plan.family, json.loads(json.dumps(plan.config))))
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in wanted.items()}
    for leaf in params.values():
        assert leaf.dtype == np.float32
        assert leaf.flags.c_contiguous


WRITTEN = [row for row in LAYOUTS if row.writes]


@pytest.mark.parametrize("layout", WRITTEN, ids=lambda layout: layout.name)
def test_a_network_has_the_names_and_shapes_of_its_authors_file(layout):
    _, plan = planned(layout, state_of(layout))
    model = build_model(plan.family, json.loads(json.dumps(plan.config)))
    found = file_shapes(layout, model)
    assert found == {key: array.shape for key, array in arrays_of(layout).items()}
    depth = config_of(model)["depth"]
    by_block = {
        name: (*value, *[value[-1]] * 10)
        for name, value in config_of(model).items()
        if isinstance(value, list | tuple) and name in BY_BLOCK and len(value) == depth
    }
    deeper = model.clone(depth=depth + 10, **by_block)
    kinds = {re.sub(r"(?<=blocks\.)\d+", "#", key) for key in file_shapes(layout, deeper)}
    assert kinds <= {re.sub(r"(?<=blocks\.)\d+", "#", key) for key in found}
    assert len(file_shapes(layout, deeper)) > 4 * len(found) // 2


@every_layout
def test_the_leaves_give_the_file_back(layout):
    state, plan = planned(layout, state_of(layout))
    params = flatten_dict(build_params(plan, state.tensors, None, lambda leaf: None), sep="/")
    given_back = {}
    for leaf in plan.leaves:
        if leaf.sources and leaf.transform in INVERSES:
            whole = INVERSES[leaf.transform](params[leaf.path])
            rows = [leaf.expected[key][0][0] for key in leaf.sources]
            parts = np.split(whole, np.cumsum(rows)[:-1])
            given_back |= dict(zip(leaf.sources, parts, strict=True))
    assert given_back
    for key, array in given_back.items():
        original = arrays_of(layout)[layout.own_names(key, state)]
        np.testing.assert_array_equal(array.reshape(original.shape), original, err_msg=key)


@every_layout
def test_a_missing_tensor_is_named(layout):
    arrays = arrays_of(layout)
    for key in chosen(arrays):
        if (layout.name, key) in COMPUTED:
            continue
        without = {k: v for k, v in arrays.items() if k != key}
        assert key in complaint(layout, without)


def chosen(arrays):
    """Returns the names of at most 26 tensors, the first and the last among them."""
    keys = list(arrays)
    return [*keys[:: max(1, len(keys) // 24)], keys[-1]]


@every_layout
def test_a_tensor_too_many_is_named(layout):
    extra = "a_layer_of_nothing.weight"
    told = complaint(layout, {**arrays_of(layout), extra: np.zeros(2, np.float32)})
    assert f"1 tensor is unexpected: {extra} [2]" in told


@every_layout
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(layout):
    arrays = arrays_of(layout)
    for key in chosen(arrays):
        array = arrays[key]
        wider = np.zeros((*array.shape[:-1], array.shape[-1] + 1), np.float32)
        if key in ALONE or key == ALONE_OF.get(layout.name):
            _, plan = planned(layout, state_of(layout, {**arrays, key: wider}))
            assert plan.config != planned(layout, state_of(layout))[1].config
        else:
            told = complaint(layout, {**arrays, key: wider})
            assert f"{key} (found {list(wider.shape)}, expected {list(array.shape)}" in told
        told = complaint(layout, {**arrays, key: array[None, None]})
        assert key in told


@every_layout
def test_values_that_are_no_numbers_are_named(layout):
    arrays = dict(arrays_of(layout))
    key = list(arrays)[len(arrays) // 2]
    arrays[key] = np.full_like(arrays[key], np.nan)
    copied = [leaf for leaf in layout.example().leaves if key in (*leaf.sources, *leaf.copies)]
    for leaf in copied:
        arrays |= {copy: arrays[key] for copy in (*leaf.sources[:1], *leaf.copies) if leaf.copies}
    state, plan = planned(layout, state_of(layout, arrays))
    with pytest.raises(UserError, match="not finite") as caught:
        build_params(plan, state.tensors, None, lambda leaf: None)
    named = layout.own_names(str(caught.value), state)
    assert any(source in named for source in copied[0].sources)


@every_layout
def test_options_that_say_nothing_of_it_are_refused_by_name(layout):
    for name, value in OPTIONS.items():
        if name in layout.options:
            check_options(layout, Choices(**{name: value}))
            continue
        option = name.replace("_", "-")
        told = re.escape(f"{name}={value!r} (--{option}) says nothing")
        with pytest.raises(UserError, match=told):
            check_options(layout, Choices(**{name: value}))


@every_layout
def test_a_file_converts(layout, tmp_path):
    example = layout.example()
    folder = tmp_path / "file"
    folder.mkdir()
    name = "diffusion_pytorch_model.safetensors"
    save_file(arrays_of(layout), folder / name)
    if example.config is not None:
        (folder / "config.json").write_text(json.dumps(example.config))
    source = folder if example.config is not None else folder / name
    read = read_model(source, family=layout.families[0], **example.choices)
    assert read.metadata["layout"] == layout.title
    assert read.metadata["source_family"] == layout.families[0]
    found = flatten_dict(to_checkpoint(read).params, sep="/")
    state, plan = planned(layout, state_of(layout))
    for path, leaf in flatten_dict(
        build_params(plan, state.tensors, None, lambda leaf: None), sep="/"
    ).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    broken = dict(arrays_of(layout))
    lost = list(broken)[-1]
    del broken[lost]
    save_file(broken, folder / name)
    with pytest.raises(UserError, match=rf"missing: {lost}".replace(".", r"\.")):
        read_model(source, family=layout.families[0], **example.choices)
