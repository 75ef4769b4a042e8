"""Which products the kernel for TPUs takes, and how they are cut into blocks."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from qdit_jax.kernels import IMPLEMENTATIONS, Product, tpu_reasons
from qdit_jax.kernels.tpu_blocks import VMEM_LIMIT, Sizes, chosen_blocks, vmem_bytes
from qdit_jax.quant import ActSpec, WeightSpec, formats, quantize, ranges

TOKEN = ActSpec(8, 0, symmetric=True)
LEVELS = {"scale_levels": 2}
W = WeightSpec


@pytest.mark.parametrize("num_channels", [64, 384, 1152, 4608, 16384])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_blocks_cover_the_product_and_fit(num_channels, bits):
    for num_rows, width in itertools.product((1, 16, 600, 4096), (1, 32, 3456, 4608, 49152)):
        sizes = Sizes(num_rows, num_channels, width, bits, -(-num_channels // 32), 4)
        blocks = chosen_blocks(sizes)
        assert blocks is not None
        assert blocks.rows % 32 == 0
        assert blocks.rows * blocks.num_rows >= num_rows
        assert blocks.rows * (blocks.num_rows - 1) < num_rows  # no grid is empty, no block idle
        assert blocks.columns * blocks.panel * blocks.panels == sizes.column_tiles * 128
        assert vmem_bytes(sizes, blocks) <= VMEM_LIMIT


def test_the_layers_of_dit_xl_hold_all_their_weights_at_once():
    for num_channels, width in ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152)):
        blocks = chosen_blocks(Sizes(4096, num_channels, width, 4, num_channels // 32, 2))
        assert (blocks.panels, blocks.num_rows, blocks.rows) == (1, 8, 512)


@pytest.fixture
def anywhere(monkeypatch):
    """What is refused by its shapes and settings, as if a TPU's compiler were installed."""
    monkeypatch.setattr(tpu_reasons, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def reason(weight=None, act=TOKEN, x_shape=(4096, 1152), **changes):
    """Returns the sentence of the row, which takes the product without changes."""
    weight = weight or W(4, 32, **LEVELS)
    settings = {"numerics": "integer", "platform": "tpu", "dtype": "bfloat16"} | changes
    product = Product(x_shape, weight, act, **settings)
    return IMPLEMENTATIONS["tpu_levels"].unsupported_reason(product)


@pytest.mark.usefixtures("anywhere")
def test_what_the_presets_make_is_taken():
    assert reason() is None
    assert reason(W(8, 0, symmetric=True)) is None
    assert reason(W(6, 32, symmetric=True, **LEVELS), dtype="float32") is None


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"platform": "cuda"}, "it runs on TPUs only."),
        ({"numerics": "simulated"}, "integer numerics, not simulated."),
        ({"dtype": "float16"}, "float32 or bfloat16, not in float16."),
        ({"act": None}, "it computes integer numerics"),
        ({"act": ActSpec(8, 0)}, "symmetric signed inputs without a shift."),
        ({"act": dataclasses.replace(TOKEN, unsigned=True)}, "symmetric signed inputs"),
        ({"act": dataclasses.replace(TOKEN, shift=0.17)}, "without a shift"),
        ({"act": ActSpec(8, 128, symmetric=True)}, "the inputs have groups of 128."),
        ({"act": dataclasses.replace(TOKEN, mode="static")}, "calibrated ones."),
        ({"act": dataclasses.replace(TOKEN, range_fn=ranges.mse())}, "minmax for inputs, not mse"),
        ({"act": ActSpec(fmt=formats.fp8_e4m3, group_size=0)}, "integers as inputs, not fp8_e4m3"),
        ({"weight": W(fmt=formats.lut4, group_size=32)}, "a step times a code, which lut4 has not"),
        ({"weight": W(4, 32)}, "two levels of scales, or symmetric weights"),
        ({"weight": W(8, 0)}, "two levels of scales, or symmetric weights"),
        ({"weight": W(4, 48, **LEVELS)}, "groups that are multiples of 32, not of 48"),
        ({"weight": W(4, 32, channel_group=2, **LEVELS)}, "channel_group is 2."),
        ({"x_shape": (8, 131072)}, "an int32 sum holds 131071 products of bytes, and K is 131072."),
        ({"x_shape": (8, 120000)}, "K = 120000 needs more than 48 MiB of VMEM."),
    ],
)
def test_what_it_cannot_compute_is_refused_by_name(changes, sentence):
    assert sentence in reason(**changes)


@pytest.mark.usefixtures("anywhere")
def test_a_stack_of_kernels_is_refused():
    make = jax.vmap(lambda w: quantize(w, W(4, 32, **LEVELS)))
    stack = jax.eval_shape(make, jnp.ones((3, 1152, 8)))
    assert "this is a stack" in reason(stack)


def test_the_machine_is_asked_before_anything_is_traced(monkeypatch):
    monkeypatch.setattr(tpu_reasons, "find_spec", lambda name: None)
    assert reason() == "libtpu is not installed."
    monkeypatch.setattr(tpu_reasons, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 3))
    assert re.match(r"it needs JAX 0\.12 or newer, and this is ", reason())
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert reason() == f"it was compiled for TPU v5e, v5p and v6e, and this is {kind()}."
    monkeypatch.setattr(tpu_reasons, "KINDS", (kind(),))
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "several devices" in reason()
    found = []

    def one_device(x):
        found.append(reason())
        return x

    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("batch")
    jax.jit(jax.shard_map(one_device, mesh=mesh, in_specs=split, out_specs=split))(jnp.ones(1))
    assert found == [None]


def kind():
    return jax.devices()[0].device_kind
