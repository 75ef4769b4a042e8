"""One table of laws for every quantizer of kernels: grids, range rules and number formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.quant import (
    WeightSpec,
    dequantize,
    formats,
    groups,
    integer_codes,
    packed_nbytes,
    qtensor,
    quantize,
    ranges,
)

K, N = 100, 12  # three groups of 32 and a shorter one

SPECS = {
    "w4": WeightSpec(4, 32),
    "w4 symmetric": WeightSpec(4, 32, symmetric=True),
    "w2": WeightSpec(2, 32),
    "w3 symmetric channel": WeightSpec(3, 0, symmetric=True),
    "w5": WeightSpec(5, 48),
    "w6": WeightSpec(6, 33),
    "w7": WeightSpec(7, 32),
    "w8 channel": WeightSpec(8, 0),
    "w4 float16": WeightSpec(4, 32, scale_dtype="float16"),
    "w8 bfloat16": WeightSpec(8, 32, scale_dtype="bfloat16"),
    "w4 channel groups": WeightSpec(4, 32, channel_group=3),
    "w4 clipped": WeightSpec(4, 32, range_fn=ranges.minmax(clip=0.8)),
    "w4 absmax": WeightSpec(4, 32, range_fn=ranges.absmax),
    "w4 percentile": WeightSpec(4, 32, range_fn=ranges.percentile(0.95)),
    "w4 mse": WeightSpec(4, 32, range_fn=ranges.mse()),
    "w3 mse symmetric": WeightSpec(3, 32, symmetric=True, range_fn=ranges.mse(20, 0.6, 2.4)),
    "w4 qdit_release": WeightSpec(4, 32, range_fn=ranges.qdit_release),
    "w4 qdit_release mse": WeightSpec(4, 32, symmetric=True, range_fn=ranges.qdit_release_mse),
    "w4 qdit_release gptq": WeightSpec(4, 32, range_fn=ranges.qdit_release_gptq),
    **{name: WeightSpec(fmt=fmt, group_size=32) for name, fmt in formats.FORMATS.items()},
    "w4 levels": WeightSpec(4, 32, scale_levels=2),
    "w2 levels": WeightSpec(2, 33, scale_levels=2),
    "w3 levels": WeightSpec(3, 32, scale_levels=2, range_fn=ranges.percentile(0.95)),
    "w5 levels channel": WeightSpec(5, 0, scale_levels=2),
    "w6 levels channel groups": WeightSpec(6, 32, scale_levels=2, channel_group=3),
    "w4 levels symmetric": WeightSpec(4, 32, symmetric=True, scale_levels=2),
    "w4 levels mse": WeightSpec(4, 48, range_fn=ranges.mse(), scale_levels=2),
}
# One level of scales: a grid of steps of any size.
PLAIN = [name for name, spec in SPECS.items() if spec.fmt is None and spec.scale_levels == 1]
UNCLIPPED = [name for name in PLAIN if SPECS[name].range_fn == ranges.minmax]
# Their grids need not hold 0.
WITHOUT_ZERO = [n for n, s in SPECS.items() if s.scale_levels == 2 and not s.symmetric]
EVERY = pytest.mark.parametrize("name", SPECS)


def hard_kernel(key: int = 0) -> np.ndarray:
    """Returns a kernel with outlier channels, and groups that are zero, constant, one-sided."""
    rng = np.random.default_rng(key)
    w = rng.normal(size=(K, N)).astype(np.float32)
    w[[3, 40, 77]] *= np.array([[10.0], [20.0], [50.0]])
    w[:32, 0] = 0
    w[32:64, 1] = 0.37
    w[64:96, 2] = -0.21
    w[:, 3] = np.abs(w[:, 3])
    w[:, 4] = -np.abs(w[:, 4])
    w[:32, 5] = 5 + rng.random(32)
    w[:, 6] *= 1e-6
    return w


def steps_of(q, spec):
    """Returns each weight's scale, and its grid's least and greatest value, from the fields."""
    scale = groups.expand_groups(jnp.float32(q.scale), q.shape, q.group_size)
    offset = 2 ** (spec.bits - 1)
    if not q.symmetric:
        offset = groups.expand_groups(q.zero_point, q.shape, q.group_size).astype(jnp.float32)
    return scale, -offset * scale, (2**spec.bits - 1 - offset) * scale


@EVERY
def test_shape_bytes_codes_and_finiteness(name):
    spec = SPECS[name]
    q = quantize(hard_kernel(), spec)
    assert q.shape == (K, N)
    assert q.nbytes == packed_nbytes(K, N, spec)
    assert q.symmetric == spec.symmetric
    assert int(integer_codes(q).max()) <= 2**spec.bits - 1
    w = dequantize(q)
    assert w.shape == (K, N)
    assert w.dtype == jnp.float32
    assert bool(jnp.isfinite(w).all())


@pytest.mark.parametrize("name", PLAIN)
def test_error_is_at_most_half_a_step_inside_the_grid(name):
    spec, w = SPECS[name], hard_kernel()
    q = quantize(w, spec)
    scale, least, greatest = steps_of(q, spec)
    error = np.abs(np.asarray(dequantize(q)) - np.clip(w, least, greatest))
    assert (error <= 0.5 * np.asarray(scale) * (1 + 1e-5) + 1e-30).all()
    if name in UNCLIPPED:
        assert (np.abs(np.asarray(dequantize(q)) - w) <= 0.5001 * np.asarray(scale)).all()


@EVERY
def test_order_within_a_group_is_kept(name):
    spec = SPECS[name]
    w = hard_kernel(1)
    restored = np.asarray(dequantize(quantize(w, spec)))
    size = spec.group_size or K
    for start in range(0, K, size):
        order = np.argsort(w[start : start + size], axis=0, kind="stable")
        after = np.take_along_axis(restored[start : start + size], order, axis=0)
        assert (np.diff(after, axis=0) >= 0).all()


@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name].fmt is None])
def test_a_value_on_the_grid_stays(name):
    spec = SPECS[name]
    q = quantize(hard_kernel(2), spec)
    again = qtensor.nearest_codes(dequantize(q), q)
    np.testing.assert_array_equal(again, integer_codes(q))


@pytest.mark.parametrize(
    "name", [n for n, f in formats.FORMATS.items() if not f.needs_whole_tensor]
)
def test_a_format_applied_twice_is_applied_once(name):
    once = dequantize(quantize(hard_kernel(3), SPECS[name]))
    np.testing.assert_array_equal(dequantize(quantize(once, SPECS[name])), once)


@EVERY
def test_zero_stays_zero(name):
    w = hard_kernel()
    w[::7] = 0
    restored = np.asarray(dequantize(quantize(w, SPECS[name])))
    assert (restored[w == 0] == 0).all() or "qdit_release" in name or name in WITHOUT_ZERO


@pytest.mark.parametrize("name", ["w4", "w3 mse symmetric", "nvfp4"])
def test_half_precision_kernels_are_quantized_as_their_values(name):
    w = jnp.asarray(hard_kernel(), jnp.bfloat16)
    a, b = quantize(w, SPECS[name]), quantize(w.astype(jnp.float32), SPECS[name])
    assert dequantize(a, jnp.bfloat16).dtype == jnp.bfloat16
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_many_calls_compile_once():
    spec = WeightSpec(5, 24, range_fn=ranges.mse(7))
    before = qtensor._quantize._cache_size()
    for key in range(3):
        quantize(hard_kernel(key), spec)
    assert qtensor._quantize._cache_size() == before + 1


@pytest.mark.parametrize("name", ["w4", "w3 symmetric channel", "nvfp4", "w4 levels", "lut4"])
def test_vmap_tree_map_and_eval_shape(name):
    spec = SPECS[name]
    stack = np.stack([hard_kernel(0), hard_kernel(1)])
    q = jax.vmap(lambda w: quantize(w, spec))(stack)
    single = dequantize(quantize(stack[1], spec))
    np.testing.assert_array_equal(dequantize(q)[1], single)
    second = jax.tree.map(lambda leaf: leaf[1], q)
    np.testing.assert_array_equal(dequantize(second), single)
    np.testing.assert_array_equal(jax.vmap(dequantize)(q)[1], single)
    abstract = jax.eval_shape(lambda w: quantize(w, spec), stack[0])
    assert jax.tree.map(lambda a: (a.shape, a.dtype), second) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract
    )


def test_wrong_kernels_are_refused():
    with pytest.raises(ValueError, match=r"w has shape \(3,\); a kernel has two axes"):
        quantize(jnp.ones(3), WeightSpec())
    with pytest.raises(TypeError, match="w has dtype int32"):
        quantize(jnp.ones((4, 4), jnp.int32), WeightSpec())
    with pytest.raises(TypeError, match="WeightSpec"):
        quantize(jnp.ones((4, 4)), spec=4)
    with pytest.raises(ValueError, match="channel_group=3 does not divide the 4 output"):
        quantize(jnp.ones((4, 4)), WeightSpec(channel_group=3))
