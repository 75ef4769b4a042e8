"""Which products the kernel for TPUs takes, and how they are cut into blocks."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import level_products
import pytest
from level_products import LEVELS, REFUSED, W, stack_of_kernels

from qdit_jax.diffusion import on_one_device
from qdit_jax.kernels import tpu_reasons
from qdit_jax.kernels.level_reasons import split_reason
from qdit_jax.kernels.tpu_blocks import VMEM_LIMIT, Sizes, chosen_blocks, vmem_bytes


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


reason = partial(level_products.reason, row="tpu_levels", platform="tpu")


@pytest.mark.usefixtures("anywhere")
def test_what_the_presets_make_is_taken():
    assert reason() is None
    assert reason(weight=W(8, 0, symmetric=True)) is None
    assert reason(weight=W(6, 32, symmetric=True, **LEVELS), dtype="float32") is None


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        *REFUSED,
        ({"platform": "cuda"}, "it runs on TPUs only."),
        ({"x_shape": (8, 120000)}, "K = 120000 needs more than 48 MiB of VMEM."),
    ],
)
def test_what_it_cannot_compute_is_refused_by_name(changes, sentence):
    assert sentence in reason(**changes)


@pytest.mark.usefixtures("anywhere")
def test_a_stack_of_kernels_is_refused():
    assert "this is a stack" in reason(weight=stack_of_kernels())


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


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_the_mesh_says_whether_a_program_is_split(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "several devices" in split_reason(backend)
    auto, manual = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Manual
    for sizes, kinds, is_split in [
        ((1,), (auto,), False),
        ((8,), (auto,), True),
        ((8,), (manual,), False),
        ((2, 4), (manual, manual), False),
        ((2, 4), (manual, auto), True),
        ((8, 1), (manual, auto), False),
    ]:
        mesh = jax.sharding.AbstractMesh(sizes, ("batch", "model")[: len(sizes)], axis_types=kinds)
        with jax.sharding.use_abstract_mesh(mesh):
            assert (split_reason(backend) is not None) == is_split, (sizes, kinds)
    with on_one_device():
        assert split_reason(backend) is None


def kind():
    return jax.devices()[0].device_kind
