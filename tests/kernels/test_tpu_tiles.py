"""Blocks of the kernels for TPUs: which fit, which are taken, and that results do not depend on them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from epilogues import KINDS
from level_products import compiled

from qdit_jax.kernels import GELU, Gated, Mapped, Modulated, gpu_tiles, tpu_blocks, tpu_call
from qdit_jax.kernels.measured import Table
from qdit_jax.kernels.tpu_blocks import (
    TABLE,
    Blocks,
    Sizes,
    Tiles,
    blocks_by_arithmetic,
    blocks_of,
    chosen_blocks,
    misfit,
    usable,
)
from qdit_jax.kernels.tpu_groups import groups_fused
from qdit_jax.kernels.tpu_levels import levels_fused
from qdit_jax.kernels.tpu_weights import weights_fused
from qdit_jax.quant import ActQuant, InputMap, quantize

FUSED = {"levels": levels_fused, "groups": groups_fused, "weights": weights_fused}
SIZES = Sizes(4096, 1152, 4608, 4, 36, 2)
WIDE = [
    SIZES,
    dataclasses.replace(SIZES, tokens_per_sample=256, added_itemsize=4, channel_rows=2),
    Sizes(4096, 4608, 1152, 4, 36, 2, map_bytes=1, units=36),
    Sizes(70, 8960, 8960, 8, 1, 2, unpacked=2, map_bytes=12),
]


@pytest.mark.parametrize("sizes", WIDE, ids=str)
def test_usable_blocks_fit_and_the_choice_by_arithmetic_is_one(sizes):
    found = usable(sizes)
    assert len(set(found)) == len(found) > 1
    assert {misfit(tiles, sizes) for tiles in found} == {None}
    chosen = blocks_by_arithmetic(sizes)
    assert chosen in [blocks_of(tiles, sizes) for tiles in found]
    for tiles in found:
        blocks = blocks_of(tiles, sizes)
        assert blocks.rows * blocks.num_rows >= sizes.num_rows
        assert blocks.columns * blocks.panels * blocks.panel == sizes.column_tiles * 128
        assert sizes.tokens_per_sample % tiles.rows == 0
    assert usable(dataclasses.replace(sizes, num_channels=1 << 20)) == ()


@pytest.mark.parametrize(
    ("tiles", "sentence"),
    [
        (Tiles(48, 512), "rows=48 are no multiple of 32."),
        (Tiles(0, 512), "rows=0 are no multiple of 32."),
        (Tiles(512, 512), "rows=512 do not divide the 256 tokens of a sample."),
        (Tiles(256, 100), "columns=100 are no tiles of 128 that divide the 36."),
        (Tiles(256, 640), "columns=640 are no tiles of 128 that divide the 36."),
        (Tiles(256, 512, 2), "panels=2 do not divide the blocks of 512 columns."),
        (Tiles(256, 4608), "MiB of VMEM, more than 48."),
    ],
    ids=str,
)
def test_what_does_not_fit_is_told(tiles, sentence):
    sizes = dataclasses.replace(SIZES, tokens_per_sample=256, added_itemsize=4)
    assert sentence in misfit(tiles, sizes)


def test_measured_blocks_are_taken_on_their_device_and_near_their_shape(monkeypatch):
    own, narrow = Tiles(512, 128, 2), Tiles(128, 384)
    in_samples = dataclasses.replace(SIZES, tokens_per_sample=256)
    rows = [
        {"shape": dataclasses.asdict(sizes), "tiles": dataclasses.asdict(tiles)}
        for sizes, tiles in ((in_samples, narrow), (SIZES, own))
    ]
    table = TABLE.rows_of({"V": rows}, "V")
    assert table == {in_samples: narrow, SIZES: own}
    assert TABLE.rows_of({"V": rows}, "another") == {}
    monkeypatch.setattr(Table, "device", lambda self: "V")
    monkeypatch.setattr(Table, "rows", lambda self: table if self.device() == "V" else {})
    assert chosen_blocks(SIZES) == Blocks(512, 128, 8, 2, 18)
    near = dataclasses.replace(SIZES, num_rows=3000, result_itemsize=2, channel_rows=2)
    assert chosen_blocks(near) == Blocks(512, 128, 6, 2, 18)
    # Where a block lies in one sample, of those that divide its tokens.
    assert chosen_blocks(in_samples) == Blocks(128, 384, 32, 1, 12)
    few = dataclasses.replace(in_samples, tokens_per_sample=192)
    assert chosen_blocks(few) == blocks_by_arithmetic(few)
    for other in ({"num_rows": 512}, {"width": 3456}, {"bits": 8}, {"units": 9}, {"unpacked": 2}):
        far = dataclasses.replace(SIZES, **other)
        assert chosen_blocks(far) == blocks_by_arithmetic(far)
    table[SIZES] = Tiles(512, 640)  # of another version: it is not taken
    assert chosen_blocks(SIZES) == blocks_by_arithmetic(SIZES)
    monkeypatch.setattr(Table, "device", lambda self: None)
    assert chosen_blocks(in_samples) == blocks_by_arithmetic(in_samples)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tiles": None}, "row 1, tiles: it is None; give its fields."),
        ({"tiles": {"rows": 64}}, "row 1, tiles: 'columns' is missing."),
        (
            {"tiles": {"rows": 64, "columns": 64, "depth": 2}},
            "tiles: 'depth' is not known; use rows",
        ),
        ({"tiles": {"rows": "64", "columns": 64}}, "rows='64' is not a whole number of 0 or more."),
        ({"shape": {"bits": 4}}, "row 1, shape: '"),
        (None, "row 1, shape: it is None"),
    ],
)
@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_a_malformed_row_is_refused_by_name(kind, change, sentence):
    module, shape, tiles = {
        "gpu": (gpu_tiles, gpu_tiles.Shape(4096, 1152, 1152, 4, 2), gpu_tiles.Tiles()),
        "tpu": (tpu_blocks, SIZES, Tiles(512, 128)),
    }[kind]
    row = {"shape": dataclasses.asdict(shape), "tiles": dataclasses.asdict(tiles)}
    other = change if change is None else {**row, **change}
    if kind == "gpu" and "is missing" in sentence:
        other["shape"] = {"rows": 4096}
        sentence = "row 1, shape: 'channels' is missing."
    with pytest.raises(ValueError, match=rf"{module.TABLE.file}, D, row 1") as error:
        module.TABLE.rows_of({"D": [row, other]}, "D")
    assert sentence in str(error.value)


def operands(kind, dtype):
    """Returns what comes before a product, kernel, quantizer, bias and gated sum: two samples of 128 tokens."""
    rng, (weight, act) = np.random.default_rng(0), KINDS[kind]

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x = normal(2, 128, 128).astype(dtype if act else "bfloat16")
    if act is not None:
        x = Mapped(Modulated(x, normal(2, 768), 3, 4, 1e-5), InputMap(jnp.exp(normal(128))))
    q = quantize(normal(128, 512) / 16, weight)
    return x, q, act and ActQuant(act), normal(512), Gated(normal(2, 128, 512), normal(2, 1536), 1)


CUTS = [Tiles(32, 256, 2), Tiles(64, 128, 1), Tiles(128, 128, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_equal_whatever_the_blocks(kind, monkeypatch):
    x, q, act, bias, gated = operands(kind, "float32")
    by_xla = []
    plain = tpu_call.plain
    monkeypatch.setattr(tpu_call, "plain", lambda x: by_xla.append(type(x)) or plain(x))

    def products(x, q, bias, gated):
        return [
            FUSED[kind](x, q, act, "float32", bias, GELU, gated, tiles=tiles, interpret=True)[0]
            for tiles in (None, *CUTS)
        ]

    expected, *found = compiled(products)(x, q, bias, gated)
    assert Modulated not in by_xla
    assert Mapped not in by_xla
    # XLA may sum in another order for another width.
    most = 1e-6 * np.abs(expected).max() if kind == "weights" else 0
    for values in found:
        np.testing.assert_allclose(values, expected, rtol=0, atol=most)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_lie_in_two_samples_leave_norms_and_sums_to_xla(kind, monkeypatch):
    x, q, act, bias, gated = operands(kind, "float32")
    left = []
    followed = tpu_call.followed

    def spied(y, gated, parts):
        left.append(gated is not None)
        return followed(y, gated, parts)

    monkeypatch.setattr(tpu_call, "followed", spied)

    def products(x, q, bias, gated):
        return [
            FUSED[kind](x, q, act, "float32", bias, GELU, gated, tiles=tiles, interpret=True)[0]
            for tiles in (None, Tiles(256, 256))
        ]

    inside, outside = compiled(products)(x, q, bias, gated)
    assert left == [False, True]
    # A code of a token may be rounded the other way.
    np.testing.assert_allclose(outside, inside, rtol=0, atol=2e-2 * np.abs(inside).max())


def test_blocks_of_a_caller_that_do_not_fit_are_refused_by_name():
    _, q, act, *_ = operands("levels", "float32")
    x = jnp.ones((8, 128))
    with pytest.raises(ValueError, match=r"Tiles\(rows=48, .*\): rows=48 are no multiple of 32"):
        levels_fused(x, q, act, "float32", tiles=Tiles(48, 128), interpret=True)
