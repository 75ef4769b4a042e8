"""The reader of torch files: views, storages, dtypes, wrappers, and refusals by name."""

from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from convert_samples import dit_shapes, random_arrays
from torch_file import Object, Storage, Tensor, tensor

from qdit_convert import read_model
from qdit_convert.readers import open_weights
from qdit_convert.tensors import StoredTensor
from qdit_convert.wrappers import strip_prefixes, unwrap
from qdit_jax.errors import UserError


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", ml_dtypes.bfloat16, "int64", "int32", "uint8", "bool"],
)
def test_every_dtype_comes_back(pt, dtype):
    array = (np.arange(12).reshape(3, 4) % 5).astype(dtype)
    found = open_weights(pt({"a": array})).tensors["a"]
    assert found.shape == (3, 4)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found.read(), array)


def test_views_of_one_storage_keep_offset_and_strides(pt):
    values = np.arange(24, dtype=np.float32)
    storage = Storage("float32", 24, lambda: [values])
    content = {
        "transposed": Tensor(storage, 0, (6, 4), (1, 6)),
        "middle": Tensor(storage, 6, (2, 3), (6, 2)),
        "repeated": Tensor(storage, 5, (3, 2), (0, 1)),
        "scalar": Tensor(storage, 23, (), ()),
        "empty": Tensor(storage, 0, (0, 4), (4, 1)),
    }
    found = open_weights(pt(content)).tensors
    np.testing.assert_array_equal(found["transposed"].read(), values.reshape(4, 6).T)
    np.testing.assert_array_equal(found["middle"].read(), [[6, 8, 10], [12, 14, 16]])
    np.testing.assert_array_equal(found["repeated"].read(), [[5, 6]] * 3)
    assert found["scalar"].read() == 23
    assert found["empty"].read().shape == (0, 4)


def test_device_tags_and_parameters_are_plain_tensors(pt):
    array = np.arange(4, dtype=np.float32)
    made = tensor(array)
    parameter = Tensor(made.storage, 0, (4,), (1,), parameter=True)
    found = open_weights(pt({"a": parameter}, device="cuda:0")).tensors["a"]
    np.testing.assert_array_equal(found.read(), array)


def test_a_state_dict_with_attributes_is_a_table(pt):
    items = (("a", np.ones(2, np.float32)),)
    table = Object("collections.OrderedDict", (list(items),), {"_metadata": {}})
    assert set(open_weights(pt(table)).tensors) == {"a"}


@pytest.mark.parametrize(("weights", "expected"), [(None, 2.0), ("ema", 2.0), ("model", 1.0)])
def test_training_files_hold_two_sets_of_weights(pt, weights, expected):
    args = Object("argparse.Namespace", (), {"num_classes": 10, "lr": 1e-4})
    one, two = ({"module.a": np.full(3, v, np.float32)} for v in (1.0, 2.0))
    state = open_weights(pt({"model": one, "ema": two, "opt": {"step": 3}, "args": args}), weights)
    assert state.tensors["a"].read()[0] == expected
    assert state.weights == (weights or "ema")
    assert state.hints == {"num_classes": 10, "lr": 1e-4}


def test_model_weights_serve_where_there_is_no_ema(pt):
    assert open_weights(pt({"model": {"a": np.ones(1, np.float32)}, "step": 1})).weights == "model"
    with pytest.raises(UserError, match="no ema weights; it holds model"):
        open_weights(pt({"model": {"a": np.ones(1, np.float32)}}), "ema")


def table_of(*names):
    return {
        name: StoredTensor((), np.dtype("f4"), lambda i=i: np.full((), i))
        for i, name in enumerate(names)
    }


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module."])
def test_prefixes_of_wrappers_are_dropped_and_said(prefix):
    found, notes = strip_prefixes(table_of(f"{prefix}a.x", f"{prefix}b"))
    assert {name: int(tensor.read()) for name, tensor in found.items()} == {"a.x": 0, "b": 1}
    assert notes


def test_module_is_a_wrapper_only_where_all_names_have_it():
    found, notes = strip_prefixes(table_of("module.a", "c"))
    assert set(found) == {"module.a", "c"}
    assert not notes


def test_what_compiling_and_sharding_insert_is_removed_anywhere():
    names = ("blocks.0._orig_mod.w", "blocks.1.w", "_fsdp_wrapped_module.c", "my_orig_mod.d")
    found, notes = strip_prefixes(table_of(*names))
    assert set(found) == {"blocks.0.w", "blocks.1.w", "c", "my_orig_mod.d"}
    assert notes == ('removed "_fsdp_wrapped_module."', 'removed "_orig_mod."')
    with pytest.raises(UserError, match="is that of another tensor"):
        strip_prefixes(table_of("_orig_mod.a", "a"))


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch.nn.modules.linear.Linear2", "a.b"]
)
def test_anything_else_is_refused_by_name(pt, name, tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        open_weights(pt({"a": Object(name, (f"touch {marker}",))}))
    assert not marker.exists()


def test_a_call_of_a_harmless_name_cannot_reach_further(pt):
    with pytest.raises(UserError):
        open_weights(pt({"a": Object("collections.OrderedDict.fromkeys", ([1],))}))
    with pytest.raises(UserError):
        open_weights(pt({"a": Object("torch.FloatStorage", (5,))}))


def test_a_whole_module_is_refused_by_its_class(pt):
    inner = Object("torch.nn.modules.linear.Linear", (), {"weight": np.ones((2, 2), np.float32)})
    with pytest.raises(UserError, match=r"whole pickled object of class models\.DiT"):
        open_weights(pt(Object("models.DiT", (), {"_modules": {"x": inner}})))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds an empty state dict"),
        ({"ema": {}, "model": {}}, r"empty state dict \(ema\)"),
        ([1, 2], "holds a list, not a table"),
        (np.ones(3, np.float32), "holds a single tensor"),
        ({"epoch": 3, "lr": 0.1}, "holds no state dict; its entries are epoch, lr"),
        ({"model": {"a": 1}}, "the entry model holds no tensors; it holds a"),
    ],
)
def test_files_without_weights_say_so(pt, content, message):
    with pytest.raises(UserError, match=message):
        open_weights(pt(content))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ((20, (5,), (1,)), "reaches to element 25 of a storage of 24"),
        ((0, (5, 5), (5, 1)), "reaches to element 25"),
        ((-1, (2,), (1,)), "impossible size"),
        ((0, (2,), (-1,)), "impossible size"),
        ((0, (1 << 40, 1 << 20), (0, 0)), "more bytes than the whole file"),
        ((0, (2, 2), (1,)), "without a storage"),
    ],
)
def test_views_outside_their_storage_are_refused(pt, view, message):
    storage = Storage("float32", 24, lambda: [np.zeros(24, np.float32)])
    with pytest.raises(UserError, match=message):
        open_weights(pt({"a": Tensor(storage, *view)}))


def test_storages_shorter_than_they_say_are_refused(pt):
    storage = Storage("float32", 24, lambda: [np.zeros(20, np.float32)])
    with pytest.raises(UserError, match="should have 96 bytes, but has 80"):
        open_weights(pt({"a": Tensor(storage, 0, (24,), (1,))}))


@pytest.mark.parametrize("view", [(0, (24,), (1,)), (3, (2,), (1,))])
def test_a_flipped_bit_in_the_values_is_found_by_the_checksum(pt, view):
    storage = Storage("float32", 24, lambda: [np.full(24, 7.25, np.float32)])
    path = pt({"a": Tensor(storage, *view)})
    data = path.read_bytes()
    at = data.index(np.full(24, 7.25, np.float32).tobytes())
    path.write_bytes(data[: at + 90] + b"\x01" + data[at + 91 :])
    state = open_weights(path)
    with pytest.raises(UserError, match="checksum"):
        state.tensors["a"].read()


def test_unknown_kind_of_weights_names_the_known():
    with pytest.raises(UserError, match="use ema or model"):
        unwrap({"a": 1}, "x", "best")


def test_only_one_tensor_is_in_memory_at_a_time(pt):
    path = pt(random_arrays(dit_shapes(128, 4)))
    tracemalloc.start()
    read_model(path, num_heads=4, place=lambda leaf: leaf[..., :1].copy())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.3 * path.stat().st_size
