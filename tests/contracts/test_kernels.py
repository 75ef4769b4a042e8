"""The contract of every implementation in the table: `act(x) @ dequantize(q)`, or a reason.

Cases are a sample of the grid bits x group sizes x formats x activations x dtypes x shapes, the
same for every row of `IMPLEMENTATIONS`; see `docs/adding-a-kernel.md`.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qdit_jax.kernels import (
    IMPLEMENTATIONS,
    NUMERICS,
    PLATFORMS,
    Product,
    implementation_of,
    implementations_used,
    quantized_matmul,
    unsupported_reason,
)
from qdit_jax.quant import (
    ActQuant,
    ActSpec,
    WeightSpec,
    dequantize,
    formats,
    group_extremes,
    quantize,
    static_act_quant,
)

ROWS = (
    "outliers",
    "more outliers",
    "zeros",
    "constant",
    "one-sided",
    "tiny",
    "huge",
    "one zero group",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One product: `sizes` are K, N, the group sizes of inputs and weights."""

    act: ActSpec | None
    weight: WeightSpec
    sizes: tuple[int, int]
    dtype: str = "float32"
    per_sample: bool = False

    def __str__(self):
        def words(spec):
            if spec is None:
                return "none"
            kind = spec.fmt.name if spec.fmt else f"{spec.bits}bit"
            static = " static" if getattr(spec, "mode", "") == "static" else ""
            signs = " symmetric" if spec.symmetric and not spec.fmt else ""
            signs += " unsigned" if getattr(spec, "unsigned", False) else ""
            signs += " levels" if getattr(spec, "scale_levels", 1) == 2 else ""
            return f"{kind}{signs}{static} g{spec.group_size}"

        rows = " rows" if self.per_sample else ""
        return f"{words(self.act)}{rows} by {words(self.weight)} {self.sizes} {self.dtype}"


UNSIGNED = {"symmetric": True, "unsigned": True, "shift": 0.1701}
A, W = ActSpec, WeightSpec
F = formats
CASES = [
    # bits 2 to 8, group sizes that are equal, unequal, whole, and do not divide K
    Case(A(8, 32), W(4, 32), (96, 8)),
    Case(A(8, 32), W(4, 48), (100, 9), "bfloat16"),
    Case(A(4, 33), W(2, 32), (77, 5)),
    Case(A(6, 0), W(3, 32, symmetric=True), (100, 8)),
    Case(A(2, 128), W(5, 0), (130, 7)),
    Case(A(3, 16), W(6, 0, scale_dtype="bfloat16"), (33, 1)),
    Case(A(5, 1000), W(7, 20), (50, 8), "bfloat16"),
    Case(A(7, 1), W(8, 3), (10, 3)),
    Case(A(8, 64), W(8, 128, scale_dtype="float16"), (256, 8)),
    Case(A(8, 5), W(4, 7), (1, 4)),
    Case(A(8, 128), W(4, 128), (300, 9)),
    # symmetric, unsigned with a shift, scales shared by neighboring channels
    Case(A(8, 32, symmetric=True), W(3, 48, symmetric=True, channel_group=2), (96, 8)),
    Case(A(4, 33, **UNSIGNED), W(4, 32), (77, 8)),
    Case(A(8, 0, **UNSIGNED), W(8, 0, symmetric=True), (100, 6), "bfloat16"),
    # calibrated scales: one for a tensor, by group, and a row for each sample
    Case(A(8, 0, mode="static"), W(4, 48), (100, 8)),
    Case(A(4, 32, mode="static"), W(4, 32), (100, 8), "bfloat16"),
    Case(A(8, 32, mode="static"), W(6, 0), (96, 8), per_sample=True),
    Case(A(6, 0, mode="static", **UNSIGNED), W(8, 32), (96, 8), per_sample=True),
    # inputs as they are
    Case(None, W(4, 32), (100, 8)),
    Case(None, W(3, 32), (100, 130), "bfloat16"),
    Case(None, W(fmt=F.nvfp4), (77, 8), "bfloat16"),
    # number formats with each other and with integers
    Case(A(fmt=F.fp8_e4m3, group_size=32), W(fmt=F.fp8_e5m2, group_size=48), (100, 8)),
    Case(A(fmt=F.fp8_e5m2, group_size=0), W(fmt=F.fp8_e4m3, group_size=0), (77, 8), "bfloat16"),
    Case(A(fmt=F.fp8_e4m3, group_size=0), W(fmt=F.fp8_e4m3, group_size=0), (128, 8)),
    Case(A(fmt=F.fp4_e2m1, group_size=64), W(4, 64), (128, 8)),
    Case(A(8, 0, symmetric=True), W(fmt=F.fp4_e2m1, group_size=32), (96, 8)),
    Case(A(fmt=F.nvfp4), W(fmt=F.mxfp8), (20, 8)),
    Case(A(fmt=F.mxfp4), W(fmt=F.nvfp4), (100, 8)),
    Case(A(fmt=F.mxfp8), W(fmt=F.mxfp4), (64, 8), "bfloat16"),
    Case(A(fmt=F.nf4, group_size=1000), W(6, 0), (77, 8)),
    Case(A(4, 33, **UNSIGNED), W(fmt=F.nf4, group_size=0), (77, 8)),
    Case(A(fmt=F.fp8_e4m3, group_size=0), W(fmt=F.nf4, group_size=32), (96, 8)),
    Case(A(fmt=F.nf4, group_size=32), W(fmt=F.mxfp8), (64, 8)),
    # two levels of scales and learned codebooks: int8 levels, whatever the groups of the inputs
    Case(A(8, 0, symmetric=True), W(4, 32, scale_levels=2), (100, 8)),
    Case(A(8, 0, symmetric=True), W(4, 32, scale_levels=2), (256, 9), "bfloat16"),
    Case(A(8, 0, symmetric=True), W(8, 0, symmetric=True), (128, 9)),
    Case(A(8, 0), W(3, 48, scale_levels=2, channel_group=2), (77, 8), "bfloat16"),
    Case(A(8, 33), W(6, 32, symmetric=True, scale_levels=2), (100, 8)),
    Case(A(8, 0, mode="static", **UNSIGNED), W(2, 0, scale_levels=2), (96, 8), per_sample=True),
    Case(A(fmt=F.fp8_e4m3, group_size=0), W(5, 32, scale_levels=2), (96, 8)),
    Case(None, W(4, 32, scale_levels=2), (100, 8)),
    Case(A(8, 0, symmetric=True), W(fmt=F.lut4, group_size=16), (100, 8)),
    Case(A(4, 32, **UNSIGNED), W(fmt=F.lut4, group_size=32), (77, 8), "bfloat16"),
    Case(A(fmt=F.fp4_e2m1, group_size=32), W(fmt=F.lut4, group_size=0), (96, 8)),
]


def compiled(fn):
    """Returns `fn` compiled without LLVM's optimizations, which take most of the time here."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def inputs(num_channels, dtype):
    """Returns `[4, 2, K]`: a row for each of `ROWS`."""
    rng = np.random.default_rng(num_channels)
    rows = {name: rng.normal(size=num_channels) for name in ROWS}
    rows["outliers"][::17] *= 20
    rows["more outliers"][2::9] *= 50
    rows["more outliers"][0] *= 10
    rows["zeros"][:] = 0
    rows["constant"][:] = 3
    rows["one-sided"] = np.abs(rows["one-sided"]) + 1
    rows["tiny"] *= 1e-20
    rows["huge"] *= 1e20
    rows["one zero group"][:32] = 0
    return np.stack(list(rows.values())).reshape(4, 2, -1).astype(jnp.dtype(dtype))


def kernel_values(num_channels, width):
    rng = np.random.default_rng(width)
    w = rng.normal(size=(num_channels, width)).astype(np.float32)
    w[::13] *= 10
    for column, values in enumerate([0, 0.7, np.abs(w[:, -1])][: width - 1]):
        w[:, column] = values
    w[:32, -1] = 0 if num_channels > 32 else w[:32, -1]
    return w


def act_quant(case, x):
    """Returns the quantizer of a case, calibrated on ordinary rows where it is static."""
    if case.act is None or case.act.mode == "dynamic":
        return case.act and ActQuant(case.act)
    low, high = group_extremes(x[:1], case.act.group_size)
    if not case.per_sample:
        return static_act_quant(low, high, case.act)
    table = static_act_quant(np.stack([low, 2 * low]), np.stack([high, 2 * high]), case.act)
    return table.at(jnp.array([1, 0, 0, 1]))


def relative_error(found, x, w, shift=0.0):
    """Returns the greatest error against float64, in units of the sum of magnitudes."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    magnitude = (np.abs(x) + shift) @ np.abs(w)
    error = np.abs(np.asarray(found, np.float64) - x @ w)
    assert (error[magnitude == 0] == 0).all()
    return float(np.max(np.divide(error, magnitude, where=magnitude > 0, out=0 * error)))


def runs_or_says_why(case, x, q, act, numerics, name):
    """Returns whether an implementation takes a case; a refusal must be a sentence."""
    reason = unsupported_reason(x.shape, q, act, numerics, name, dtype=case.dtype)
    if reason is None:
        return True
    assert reason.endswith("."), reason
    assert len(reason.split()) >= 4, reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        quantized_matmul(x, q, act, numerics, name)
    return False


def products(case, x, q, act):
    """Returns `{(name, numerics): product}` of everything that takes a case, in one program."""
    ran = [
        (name, numerics)
        for name in IMPLEMENTATIONS
        for numerics in NUMERICS
        if runs_or_says_why(case, x, q, act, numerics, name)
    ]
    assert ran, "no implementation takes this case"

    def run(x, q, act):
        return [quantized_matmul(x, q, act, numerics, name) for name, numerics in ran]

    return dict(zip(ran, compiled(run)(x, q, act), strict=True)) | interpreted(case, x, q, act)


def interpreted(case, x, q, act):
    """Returns `{(name, numerics): product}` of the kernels for TPUs that take a case, on CPU."""
    found = {}
    for (name, row), numerics in itertools.product(IMPLEMENTATIONS.items(), NUMERICS):
        product = Product(x.shape, q, act, numerics, "tpu", case.dtype)
        if name.startswith("tpu_") and row.fits(product):
            run = functools.partial(row.run, numerics=numerics, interpret=True)
            found[name, numerics] = compiled(run)(x, q, act)
    return found


def prepared(case):
    """Returns input, kernel and activation quantizer of a case, and both operands rounded."""
    x = inputs(case.sizes[0], case.dtype)
    act = act_quant(case, x)

    def rounded(x, w, act):
        wide, q = x.astype(jnp.float32), quantize(w, case.weight)
        return q, wide if act is None else act(wide), dequantize(q)

    return x, act, *compiled(rounded)(x, kernel_values(*case.sizes), act)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_implementation_is_the_product_of_the_rounded_operands(case):
    x, act, q, rounded, w = prepared(case)
    tolerance = {"float32": 2e-6, "bfloat16": 2**-8}[case.dtype]
    if case.act is None and case.dtype == "bfloat16":
        tolerance = 2**-7  # weights are rounded to bfloat16 too
    shift = 0.0 if case.act is None else case.act.shift
    for key, y in products(case, x, q, act).items():
        assert y.shape == (*x.shape[:-1], case.sizes[1]), key
        assert y.dtype == case.dtype, key
        assert relative_error(y, rounded, w, shift) < tolerance, key


@pytest.mark.parametrize(
    "act",
    [A(8, 32), A(8, 0, mode="static"), A(fmt=F.fp8_e4m3, group_size=32)],
    ids=["dynamic", "static", "fp8"],
)
def test_a_row_with_nan_is_nan_and_touches_no_other(act):
    case = Case(act, W(4, 32), (64, 8))
    x, quantizer, q, rounded, w = prepared(case)
    x[1, 1, 5] = np.nan
    for key, y in products(case, x, q, quantizer).items():
        found = np.array(y, np.float64)
        assert np.isnan(found[1, 1]).all(), key
        others = np.array(rounded)
        found[1, 1], others[1, 1] = 0, 0
        assert relative_error(found, others, w) < 2e-6, key


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_reasons_need_no_values_and_names_are_their_own(name):
    entry = IMPLEMENTATIONS[name]
    assert entry.name == name
    takes = {}
    for act, weight in (
        (A(8, 32), W(4, 32)),
        (A(8, 0, symmetric=True), W(4, 32, scale_levels=2)),
        (A(fmt=F.fp8_e4m3, group_size=0), W(fmt=F.fp8_e4m3, group_size=0)),
    ):
        q = jax.eval_shape(lambda w, spec=weight: quantize(w, spec), jnp.ones((128, 8)))
        for platform, numerics in itertools.product(PLATFORMS, NUMERICS):
            settings = {"platform": platform, "dtype": "float32"}
            reason = unsupported_reason((2, 128), q, act, numerics, name, **settings)
            takes[weight, platform, numerics] = reason
    for reason in takes.values():
        assert reason is None or reason.startswith(f"implementation={name!r}: ")
    missing = [
        reason
        for reason in takes.values()
        if reason and ("is not installed" in reason or "needs JAX" in reason)
    ]
    assert None in takes.values() or missing, "it never runs"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_something_runs_everything_everywhere(platform):
    for case in CASES:
        q = jax.eval_shape(lambda w, c=case: quantize(w, c.weight), jnp.ones(case.sizes))
        act = None if case.act is None else ActQuant(case.act)
        for numerics in NUMERICS if act else NUMERICS[:1]:
            shape = (2, case.sizes[0])
            assert implementation_of(shape, q, act, numerics, platform, dtype=case.dtype)


def test_the_first_that_fits_runs_and_reports_say_which():
    q = quantize(np.ones((96, 8), np.float32), W(4, 32))
    for platform, name in {"cpu": "xla_cpu", "cuda": "xla", "tpu": "xla"}.items():
        assert implementation_of((2, 96), q, A(), "integer", platform, dtype="float32") == name
    stack = jax.vmap(lambda w: quantize(w, W(4, 32)))(jnp.ones((3, 96, 8)))
    table = ActQuant(A(mode="static"), jnp.ones((5, 1)), jnp.ones((5, 1)))
    params = {
        "proj": {"kernel": q, "act_quant": table, "bias": jnp.zeros(8)},
        "blocks": {"fc": {"kernel": stack, "act_quant": ActQuant(A())}},
        "final": {"kernel": jnp.ones((4, 4))},
    }
    used = implementations_used(
        params, "integer", dtype="float32", platform="cpu", rows={"proj": 16}
    )
    assert used == {"xla_cpu": 4}
    assert implementations_used({"final": params["final"]}, dtype="float32") == {}
    with pytest.raises(ValueError, match="integer numerics need quantized activations"):
        implementations_used({"proj": {"kernel": q}}, "integer", dtype="float32")


def test_a_name_that_does_not_fit_is_refused_with_its_reason():
    q = quantize(np.ones((96, 8), np.float32), W(4, 32))
    x = jnp.ones((2, 96))
    with pytest.raises(ValueError, match="implementation='fast' is not known; use one of xla"):
        quantized_matmul(x, q, implementation="fast")
    reason = unsupported_reason(
        (2, 96), q, implementation="xla_cpu", platform="cuda", dtype="float32"
    )
    assert reason == (
        "implementation='xla_cpu': xla_cpu orders the work of XLA:CPU, not of cuda; use 'xla'."
    )
    with pytest.raises(ValueError, match="platform='gpu' is not known; use one of cpu, cuda"):
        implementation_of((2, 96), q, platform="gpu", dtype="float32")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_result_has_the_dtype_that_is_asked_for(name):
    x, act = inputs(128, "float32"), A(8, 0, symmetric=True)
    q = quantize(kernel_values(128, 8), W(4, 32, scale_levels=2))
    if unsupported_reason(x.shape, q, act, "integer", name, dtype="float32"):
        pytest.skip(f"{name} does not run here")
    wide = quantized_matmul(x, q, act, "integer", name)
    found = quantized_matmul(x, q, act, "integer", name, out_dtype="bfloat16")
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found, wide.astype("bfloat16"))
