"""Tensors of torch files in both formats: put-off operations, every name of torch's safe loader."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from torch_file import Global, Object, Storage, Tensor, tensor

from qdit_convert import read_model
from qdit_convert.readers import open_weights
from qdit_jax.errors import UserError

HOOKS = Object("collections.OrderedDict")


def made(name, *arguments):
    return Object(f"torch._utils._rebuild_{name}", arguments)


def view_v2(array, *rest, offset=0, strides=None):
    plain = tensor(array)
    strides = plain.strides if strides is None else strides
    return made("tensor_v2", plain.storage, offset, array.shape, strides, False, HOOKS, *rest)


def untyped(array):
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Storage("untyped", raw.size, lambda: [raw])


def test_a_negated_view_has_the_values_that_torch_shows(either):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    half = values.astype(ml_dtypes.bfloat16)
    content = {
        "plain": view_v2(values, {"neg": False}),
        "negated": view_v2(values, {"neg": True}),
        "transposed": view_v2(values.reshape(4, 3), {"neg": True}, strides=(1, 4)),
        "half": view_v2(half, {"neg": True}),
        "parameter": made("parameter", view_v2(values, {"neg": True}), True, HOOKS),
        "none": view_v2(values, None),
        "no_flags": view_v2(values, {}),
    }
    found = {k: t.read() for k, t in open_weights(either({"model": content})).tensors.items()}
    np.testing.assert_array_equal(found["plain"], values)
    np.testing.assert_array_equal(found["negated"], -values)
    np.testing.assert_array_equal(found["transposed"], -values.reshape(3, 4).T)
    np.testing.assert_array_equal(found["half"], -half)
    np.testing.assert_array_equal(found["parameter"], -values)
    np.testing.assert_array_equal(found["none"], values)
    np.testing.assert_array_equal(found["no_flags"], values)


def test_a_conjugated_view_is_conjugated(either):
    values = np.array([1 + 2j, 3 - 4j], np.complex64)
    content = {
        "conj": view_v2(values, {"conj": True}),
        "both": view_v2(values, {"conj": True, "neg": True}),
    }
    found = open_weights(either({"model": content})).tensors
    np.testing.assert_array_equal(found["conj"].read(), values.conj())
    np.testing.assert_array_equal(found["both"].read(), -values.conj())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"zero": True}, "'zero': True, which convert does not know"),
        ({"neg": 1}, "'neg': 1, which convert does not know"),
        ({"conj": True}, "'conj', but its values are float32"),
        ([True], "metadata that are not a table"),
    ],
)
def test_flags_that_are_not_understood_are_refused_by_name(either, metadata, message):
    with pytest.raises(UserError, match=message):
        open_weights(either({"a.b": view_v2(np.ones(2, np.float32), metadata)}))


def test_a_negated_weight_reaches_the_checkpoint(either, dit):
    name = "blocks.0.mlp.fc1.bias"
    read = read_model(either({**dit, name: view_v2(dit[name], {"neg": True})}), num_heads=2)
    np.testing.assert_array_equal(read.params["blocks_0"]["mlp"]["fc1"]["bias"], -dit[name])


@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16", "uint32"],
)
def test_untyped_storages_take_the_dtype_of_the_tensor(either, dtype):
    array = np.array([[1, 2, 3], [4, 5, 6]]).astype(getattr(ml_dtypes, dtype, dtype))
    rest = (False, HOOKS, Global(f"torch.{dtype}"))
    content = {
        "whole": made("tensor_v3", untyped(array), 0, (2, 3), (3, 1), *rest),
        "row": made("tensor_v3", untyped(array), 3, (3,), (1,), *rest),
        "column": made("tensor_v3", untyped(array), 1, (2,), (3,), *rest),
    }
    found = open_weights(either({"model": content})).tensors
    np.testing.assert_array_equal(found["whole"].read(), array)
    np.testing.assert_array_equal(found["row"].read(), array[1])
    np.testing.assert_array_equal(found["column"].read(), array[:, 1])


def test_a_negated_float8_and_its_end(either):
    array = np.array([1, -2], ml_dtypes.float8_e4m3fn)
    rest = (False, HOOKS, Global("torch.float8_e4m3fn"), {"neg": True})
    read = open_weights(
        either({"model": {"a": made("tensor_v3", untyped(array), 0, (2,), (1,), *rest)}})
    )
    np.testing.assert_array_equal(read.tensors["a"].read(), -array)
    with pytest.raises(UserError, match="reaches to element 3 of a storage of 2"):
        open_weights(either({"a.b": made("tensor_v3", untyped(array), 0, (3,), (1,), *rest)}))


VALUES = np.arange(4, dtype=np.float32)


@pytest.mark.parametrize(
    "value",
    [
        made("tensor", tensor(VALUES).storage, 0, (4,), (1,)),
        made("parameter", VALUES, True, HOOKS),
        made("parameter_with_state", VALUES, True, HOOKS, {"foo": 3}),
        Object("torch.nn.parameter.Parameter", (VALUES, True)),
        Object(
            "torch._tensor._rebuild_from_type_v2",
            (
                Global("torch._utils._rebuild_tensor_v2"),
                Global("torch.Tensor"),
                (tensor(VALUES).storage, 0, (4,), (1,), False, HOOKS),
                {"tag": [1]},
            ),
        ),
        made("device_tensor_from_cpu_tensor", VALUES, Global("torch.float32"), "xla:0", False),
        made(
            "device_tensor_from_cpu_tensor",
            VALUES.astype(np.float64),
            Global("torch.float32"),
            "xla:0",
            False,
        ),
    ],
)
def test_every_form_of_a_bare_weight_is_read(either, value):
    found = open_weights(either({"model": {"a": value}})).tensors["a"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.read(), VALUES)


def latin(text):
    return Object("_codecs.encode", (text, "latin1"))


def number(code, data):
    dtype = Object("numpy.dtype", (code, False, True), (3, "<", None, None, None, -1, -1, 0))
    return Object("numpy._core.multiarray.scalar", (dtype, latin(data.decode("latin1"))))


SETTINGS = {
    "device": Object("torch.device", ("cuda", 0)),
    "dtype": Global("torch.bfloat16"),
    "size": Object("torch.Size", ((1, 2),)),
    "set": Object("__builtin__.set", ([1, 2],)),
    "bytes": latin("abc"),
    "bytearray": Object("builtins.bytearray", (latin("abc"),)),
    "complex": Object("builtins.complex", (1.0, 2.0)),
    "layout": Object("torch.serialization._get_layout", ("torch.strided",)),
    "qscheme": Global("torch.per_tensor_affine"),
    "counter": Object("collections.Counter", ({"a": 2},)),
    "storage": tensor(VALUES).storage,
    "big": 2**70,
    "pairs": {(1, "a"): 2, Global("torch.float32"): 3},
    "array": Object(
        "numpy._core.multiarray._reconstruct",
        (Global("numpy.ndarray"), (0,), latin("b")),
        (1, (3,), Object("numpy.dtype", ("f8", False, True)), False, latin("x" * 24)),
    ),
    "rate": number("f8", np.float64(0.25).tobytes()),
    "classes": number("i8", np.int64(10).tobytes()),
}


def test_what_torchs_safe_loader_takes_may_lie_beside_the_weights(either, dit):
    args = Object("argparse.Namespace", (), {**SETTINGS, "lr": 1e-4})
    state = open_weights(either({"model": dit, "args": args, "more": SETTINGS}))
    assert state.hints["lr"] == 1e-4
    assert state.hints["rate"] == 0.25
    assert state.hints["classes"] == 10
    assert set(state.tensors) == set(dit)


@pytest.mark.parametrize(
    "value",
    [
        Object("builtins.bytearray", (10**12,)),
        Object("builtins.set", (5,)),
        Object("torch.Size", (10**12,)),
        Object("_codecs.encode", ("abc", "rot13")),
        Object("builtins.complex", ("1",)),
    ],
)
def test_harmless_names_take_harmless_arguments_only(either, value):
    with pytest.raises(UserError):
        open_weights(either({"a": value}))


SPARSE = Object("torch.serialization._get_layout", ("torch.sparse_coo",))
ROWS = Object("torch.serialization._get_layout", ("torch.sparse_csr",))
WIDE = Object("torch.Size", ((48, 16),))
INDICES = np.zeros((2, 4), np.int64)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (made("sparse_tensor", SPARSE, (INDICES, VALUES, WIDE, True)), "a sparse_coo tensor"),
        (made("sparse_tensor", SPARSE, (INDICES, VALUES, WIDE)), "a sparse_coo tensor"),
        (made("sparse_tensor", ROWS, (INDICES, INDICES, VALUES, WIDE)), "a sparse_csr tensor"),
        (
            made("meta_tensor_no_storage", Global("torch.float32"), (48, 16), (16, 1), False),
            "on the meta device, which holds no values",
        ),
        (
            made(
                "qtensor",
                *(Storage("qint8", 768, lambda: [np.zeros(768, np.int8)]), 0, (48, 16), (16, 1)),
                *((Global("torch.per_tensor_affine"), 0.1, 0), False, HOOKS),
            ),
            "a quantized tensor",
        ),
        (
            made(
                "tensor_v3",
                *(untyped(np.zeros(768, np.int32)), 0, (48, 16), (16, 1), False, HOOKS),
                Global("torch.complex32"),
            ),
            r"of torch\.complex32",
        ),
        (
            made(
                "wrapper_subclass",
                *(Global("torch.Tensor"), Global("torch.float32"), (48, 16), (16, 1), 0, SPARSE),
                *(Object("torch.device", ("cpu",)), False),
            ),
            "a wrapper that holds no values",
        ),
    ],
)
def test_tensors_that_hold_no_plain_numbers_are_named(either, dit, value, message):
    name = "blocks.0.attn.qkv.weight"
    with pytest.raises(UserError, match=rf"1 tensor holds no plain numbers: {name} \({message}\)"):
        read_model(either({**dit, name: value}), num_heads=2)
    # Beside the weights it is no obstacle.
    assert read_model(either({"model": dit, "opt": {"x": value}}), num_heads=2).family == "dit"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((48, 16), np.complex64), r"is not floating point: .* \(complex64\)"),
        (np.zeros((48, 16), np.int8), r"is not floating point: .* \(int8\)"),
        (np.zeros((48, 16), bool), r"is not floating point: .* \(bool\)"),
        (np.zeros((), np.float32), r"found \[\], expected \[48, 16\]"),
        (np.zeros((0, 16), np.float32), r"found \[0, 16\], expected \[48, 16\]"),
        (np.zeros((48, 0), np.float32), r"found \[48, 0\], expected \[48, 16\]"),
    ],
)
def test_tensors_of_other_kinds_are_named(either, dit, array, message):
    with pytest.raises(UserError, match=message):
        read_model(either({**dit, "blocks.0.attn.qkv.weight": array}), num_heads=2)


def test_eight_bit_floats_are_named(either, dit):
    array = np.zeros((48, 16), ml_dtypes.float8_e4m3fn)
    rest = (0, (48, 16), (16, 1), False, HOOKS, Global("torch.float8_e4m3fn"))
    content = {**dit, "blocks.0.attn.qkv.weight": made("tensor_v3", untyped(array), *rest)}
    with pytest.raises(UserError, match=r"1 tensor is an 8-bit float: .* \(float8_e4m3fn\)"):
        read_model(either(content), num_heads=2)


def test_a_key_twice_in_a_pickled_table_is_refused(either):
    items = [("a.b", VALUES), ("a.b", VALUES)]
    with pytest.raises(UserError, match=r"holds 'a\.b' twice in one table"):
        open_weights(either(Object("collections.OrderedDict", (items,))))


def test_one_dotted_name_from_two_nestings_is_refused(either):
    with pytest.raises(UserError, match=r"'a\.b' stands twice"):
        open_weights(either({"model": {"a": {"b": VALUES}, "a.b": VALUES}}))


def test_the_old_format_is_read_without_torch(tmp_path, dit):
    from torch_file import write_old_torch_file

    path = tmp_path / "old.pt"
    shared = Storage("float32", 24, lambda: [np.arange(24, dtype=np.float32)])
    content = {
        "model": {
            "transposed": Tensor(shared, 0, (6, 4), (1, 6)),
            "middle": Tensor(shared, 6, (2, 3), (6, 2)),
        }
    }
    write_old_torch_file(path, content, device="cuda:0")
    found = open_weights(path).tensors
    np.testing.assert_array_equal(
        found["transposed"].read(), np.arange(24, dtype=np.float32).reshape(4, 6).T
    )
    np.testing.assert_array_equal(found["middle"].read(), [[6, 8, 10], [12, 14, 16]])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="ends early"):
        open_weights(path)
    path.write_bytes(whole.replace(b"little_endian\x88", b"little_endian\x89"))
    with pytest.raises(UserError, match="big-endian"):
        open_weights(path)
    path.write_bytes(whole[:-104] + b"\x17" + whole[-103:])
    with pytest.raises(UserError, match="should have 96 bytes, but has 92"):
        open_weights(path)
