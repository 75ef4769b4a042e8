"""Which products the kernel for NVIDIA GPUs takes, and how they are cut into blocks."""

import dataclasses
import itertools
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import level_products
import pytest
from level_products import LEVELS, REFUSED, TOKEN, W, stack_of_kernels

from qdit_jax.kernels import (
    gpu_check,
    gpu_reasons,
    implementation_of,
    measured,
    passed_over,
    quantized_matmul,
)
from qdit_jax.kernels.gpu_tiles import (
    CANDIDATES,
    FLOATS,
    GROUPED,
    TABLE,
    WIDE,
    Shape,
    Tiles,
    chosen_tiles,
    fits,
    tiles_by_arithmetic,
    usable,
)
from qdit_jax.kernels.measured import Table
from qdit_jax.quant import ActSpec, expanded, formats, quantize, ranges

LAYERS = ((1152, 3456), (1152, 1152), (1152, 4608), (4608, 1152))


@pytest.fixture
def anywhere(monkeypatch):
    """What is refused by its shapes and settings, as if JAX's plugin for CUDA were installed."""
    monkeypatch.setattr(gpu_reasons, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


reason = partial(level_products.reason, row="gpu_levels", platform="cuda")
WEIGHT, GROUP = W(4, 128), ActSpec(8, 128)
E4M3, E5M2 = formats.fp8_e4m3, formats.fp8_e5m2
FP8, FP8_TOKEN = W(fmt=E4M3, group_size=0), ActSpec(fmt=E4M3, group_size=0)


def grouped(weight=WEIGHT, act=GROUP, **changes):
    """Returns the sentence of the kernel in groups, which takes the product without changes."""
    settings = {"platform": "cuda", "weight": weight, "act": act, **changes}
    return level_products.reason(row="gpu_groups", **settings)


def alone(weight=WEIGHT, act=None, **changes):
    """Returns the sentence of the kernel for weights alone, which takes the product without changes."""
    settings = {"platform": "cuda", "numerics": "simulated", **changes}
    return level_products.reason(row="gpu_weights", weight=weight, act=act, **settings)


def in_fp8(weight=FP8, act=FP8_TOKEN, **changes):
    """Returns the sentence of the kernel for FP8, which takes the product without changes."""
    settings = {"platform": "cuda", "weight": weight, "act": act, **changes}
    return level_products.reason(row="gpu_fp8", **settings)


def taken(weight, dtype):
    settings = {"platform": "cuda", "dtype": dtype}
    return implementation_of((4096, 1152), weight, None, "simulated", **settings)


@pytest.mark.usefixtures("anywhere")
def test_what_the_presets_make_is_taken_before_xla():
    assert reason() is None
    assert reason(weight=W(8, 0, symmetric=True)) is None
    assert reason(weight=W(4, 0, symmetric=True), dtype="float32") is None
    for platform, name in {"cuda": "gpu_levels", "rocm": "xla", "cpu": "xla_cpu"}.items():
        settings = {"platform": platform, "dtype": "bfloat16"}
        weight = W(4, 32, **LEVELS)
        assert implementation_of((4096, 1152), weight, TOKEN, "integer", **settings) == name


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        *REFUSED,
        ({"platform": "rocm"}, "it runs on NVIDIA GPUs only."),
        ({"weight": W(6, 32, **LEVELS)}, "it unpacks 4 and 8 bits, not 6."),
        ({"x_shape": (8, 1100)}, "it takes input channels in runs of 128, and K is 1100."),
    ],
)
def test_what_it_cannot_compute_is_refused_by_name(changes, sentence):
    assert sentence in reason(**changes)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_bits_that_they_do_not_unpack_reach_them_expanded(bits):
    for act, name in ((None, "gpu_weights"), (GROUP, "gpu_groups")):
        q = quantize(jnp.ones((128, 64)), W(bits, 128))
        numerics = "simulated" if act is None else "integer"
        given = (act, numerics, "cuda")
        assert implementation_of((4096, 128), q, *given, dtype="bfloat16") == "xla"
        assert implementation_of((4096, 128), expanded(q), *given, dtype="bfloat16") == name


@pytest.mark.usefixtures("anywhere")
def test_products_in_groups_have_a_kernel_of_their_own():
    for weight, act in [
        (W(4, 128), GROUP),
        (W(8, 32, symmetric=True), ActSpec(4, 64, symmetric=True)),
        (W(4, 0), ActSpec(8, 0)),
        (W(4, 288), replace(GROUP, group_size=288, range_fn=ranges.mse())),
    ]:
        assert grouped(weight, act) is None
        assert reason(weight=weight, act=act) is not None
        settings = {"platform": "cuda", "dtype": "bfloat16"}
        name = implementation_of((4096, 1152), weight, act, "integer", **settings)
        assert name == "gpu_groups"


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"platform": "tpu"}, "it runs on NVIDIA GPUs only."),
        ({"numerics": "simulated"}, "integer numerics, not simulated."),
        ({"act": None}, "it computes integer numerics"),
        ({"act": ActSpec(fmt=formats.fp8_e4m3, group_size=0)}, "integers as inputs, not fp8_e4m3"),
        ({"act": replace(GROUP, mode="static")}, "calibrated ones."),
        (
            {"act": replace(GROUP, symmetric=True, unsigned=True)},
            "a zero point or symmetric signed",
        ),
        ({"act": replace(GROUP, shift=0.17)}, "without a shift"),
        ({"act": ActSpec(8, 48)}, "inputs in groups that are multiples of 32, not of 48."),
        ({"dtype": "float16"}, "float32 or bfloat16, not in float16."),
        ({"weight": W(fmt=formats.lut4, group_size=32)}, "integers as weights, not lut4."),
        ({"weight": W(4, 32, **LEVELS)}, "it takes one level of scales"),
        ({"weight": W(4, 48)}, "weights in groups that are multiples of 32, not of 48."),
        ({"weight": W(4, 32, channel_group=2)}, "channel_group is 2."),
        ({"weight": W(6, 32)}, "it unpacks 4 and 8 bits, not 6."),
        ({"x_shape": (8, 1120)}, "runs of 128, and K is 1120."),
    ],
)
def test_what_groups_cannot_be_is_refused_by_name(changes, sentence):
    assert sentence in grouped(**changes)


@pytest.mark.usefixtures("anywhere")
def test_weights_alone_have_a_kernel_of_their_own():
    for weight in [W(4, 128), W(8, 32, symmetric=True), W(4, 0), W(4, 32, **LEVELS)]:
        assert alone(weight) is None
        names = {dtype: taken(weight, dtype) for dtype in ("bfloat16", "float32")}
        assert names == {"bfloat16": "gpu_weights", "float32": "xla"}


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"platform": "tpu"}, "it runs on NVIDIA GPUs only."),
        ({"act": TOKEN}, "inputs that are not quantized"),
        ({"dtype": "float16"}, "inputs in bfloat16, not in float16"),
        ({"weight": W(fmt=formats.nf4, group_size=32)}, "integer weights, not nf4"),
        ({"weight": W(4, 48)}, "groups that are multiples of 32, not of 48"),
        ({"weight": W(4, 32, channel_group=2)}, "channel_group is 2."),
        ({"weight": W(6, 32)}, "it unpacks 4 and 8 bits, not 6."),
        ({"x_shape": (8, 1120)}, "runs of 128, and K is 1120."),
    ],
)
def test_what_weights_alone_cannot_be_is_refused_by_name(changes, sentence):
    assert sentence in alone(**changes)


@pytest.mark.usefixtures("anywhere")
def test_fp8_has_a_kernel_of_its_own():
    for of_weight, of_input in itertools.product((E4M3, E5M2), repeat=2):
        weight, act = W(fmt=of_weight, group_size=0), ActSpec(fmt=of_input, group_size=0)
        for dtype in ("bfloat16", "float32"):
            assert in_fp8(weight, act, dtype=dtype) is None
        assert in_fp8(replace(weight, group_size=1152), replace(act, group_size=1152)) is None
        settings = {"platform": "cuda", "dtype": "bfloat16"}
        name = implementation_of((4096, 1152), weight, act, "integer", **settings)
        assert name == "gpu_fp8"
        assert implementation_of((4096, 1152), weight, act, "simulated", **settings) == "xla"


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"platform": "tpu"}, "it runs on NVIDIA GPUs only."),
        ({"numerics": "simulated"}, "integer numerics, not simulated."),
        ({"act": None}, "it computes integer numerics"),
        ({"act": TOKEN}, "FP8 with float scales as inputs, not 8-bit integers."),
        ({"act": ActSpec(fmt=formats.mxfp8)}, "FP8 with float scales as inputs, not mxfp8."),
        ({"act": replace(FP8_TOKEN, mode="static")}, "calibrated ones."),
        ({"act": replace(FP8_TOKEN, group_size=128)}, "the inputs have groups of 128."),
        ({"dtype": "float16"}, "float32 or bfloat16, not in float16."),
        ({"weight": W(8, 0, symmetric=True)}, "float scales as weights, not 8-bit integers."),
        ({"weight": W(fmt=formats.mxfp8)}, "float scales as weights, not mxfp8."),
        ({"weight": W(fmt=formats.fp4_e2m1, group_size=0)}, "as weights, not fp4_e2m1."),
        ({"weight": replace(FP8, group_size=128)}, "the weights have groups of 128."),
        ({"weight": W(4, 32, **LEVELS)}, "float scales as weights, not 4-bit integers."),
        ({"x_shape": (8, 1120)}, "runs of 128, and K is 1120."),
    ],
)
def test_what_fp8_cannot_be_is_refused_by_name(changes, sentence):
    assert sentence in in_fp8(**changes)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("weight", "act", "numerics", "told"),
    [
        (W(4, 48), ActSpec(8, 48), "integer", "gpu_groups: it takes inputs in groups that are mul"),
        (WEIGHT, GROUP, "simulated", "gpu_groups: it computes integer numerics, not simulated."),
        (W(6, 32, **LEVELS), TOKEN, "integer", "gpu_levels: it unpacks 4 and 8 bits, not 6."),
        (W(fmt=formats.nf4, group_size=32), None, "simulated", "gpu_weights: it takes integer wei"),
        (replace(FP8, group_size=128), FP8_TOKEN, "integer", "gpu_fp8: it takes one scale per out"),
        (WEIGHT, GROUP, "integer", None),  # which the kernel computes
    ],
)
def test_xla_says_which_kernel_was_passed_over(weight, act, numerics, told):
    given = ((4096, 1152), weight, act, numerics)
    found = passed_over(*given, platform="cuda", dtype="bfloat16")
    assert found is None if told is None else found.startswith(told)
    for platform in ("rocm", "cpu"):  # which have no kernel of their own
        assert passed_over(*given, platform=platform, dtype="bfloat16") is None


@pytest.mark.usefixtures("anywhere")
def test_a_stack_of_kernels_is_refused():
    assert "this is a stack" in reason(weight=stack_of_kernels())
    stack = jax.eval_shape(jax.vmap(lambda w: quantize(w, FP8)), jnp.ones((3, 1152, 8)))
    assert "this is a stack" in in_fp8(stack)


def test_the_machine_is_asked_before_anything_is_traced(monkeypatch):
    monkeypatch.setattr(gpu_reasons, "find_spec", lambda name: None)
    assert reason() == "JAX's plugin for CUDA is not installed."
    monkeypatch.setattr(gpu_reasons, "find_spec", lambda name: object())
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 3))
    assert re.match(r"it needs JAX 0\.12 or newer, and this is ", reason())
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kind = jax.devices()[0].device_kind
    assert reason() == (
        f"it was compiled for Hopper (compute capability 9.0), and this is {kind} (unknown)."
    )
    monkeypatch.setattr(gpu_reasons, "CAPABILITY", "unknown")
    wrong = {gpu_check.LEVELS: "a product was wrong."}
    monkeypatch.setattr(gpu_reasons, "wrong_here", wrong.get)
    assert reason() == "a product was wrong."
    assert grouped() is None
    assert alone() is None
    assert in_fp8() is None
    wrong[gpu_check.LEVELS] = None
    assert reason() is None
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "several devices" in reason()


@pytest.mark.parametrize("name", ["LEVELS", "GROUPS", "WEIGHTS", "FP8"])
def test_a_device_that_multiplies_wrong_is_found(name):
    check = getattr(gpu_check, name)
    numerics = "integer" if check.act else "simulated"

    def right(x, q, dtype):
        wide = x.astype("float32")  # XLA rounds sums to the dtype of its input
        return quantized_matmul(wide, q, check.act, numerics, "xla", out_dtype=dtype)

    def broken(x, q, dtype):
        raise RuntimeError("no such instruction")

    def wrong_with(product_fn):
        return gpu_check.wrong_with(product_fn, check)

    assert wrong_with(right) is None
    wrong = wrong_with(lambda x, q, dtype: right(x, q, dtype).at[3, 7].add(9000))
    first = f"a product of {check.bits[0]} bits was wrong on this device, by "
    assert wrong.startswith(first)
    nan = wrong_with(lambda x, q, dtype: right(x, q, dtype) * jnp.nan)
    assert nan.startswith(first)
    late = wrong_with(lambda x, q, dtype: right(x, q, dtype) + 1e4 * (dtype == "float32"))
    assert late.startswith("a product of 8 bits was wrong")
    assert wrong_with(broken) == "it does not run here (RuntimeError: no such instruction)."


@pytest.mark.parametrize(
    ("unit", "x_bits", "elements"),
    [
        *((unit, 8, "integer") for unit in (0, 32, 64, 128)),
        *((unit, 16, "integer") for unit in (32, 64, 128)),
        (0, 8, "fp8"),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_fit_and_leave_no_layer_without_one(bits, unit, x_bits, elements):
    blocks = WIDE if x_bits == 16 else GROUPED if unit else CANDIDATES
    blocks = FLOATS if elements == "fp8" else blocks
    for itemsize, rows in itertools.product((2, 4), (1, 512, 4096, 16384)):
        for channels, width in LAYERS:
            shape = Shape(rows, channels, width, bits, itemsize, unit, x_bits, elements)
            tiles = tiles_by_arithmetic(shape)
            assert tiles in usable(shape)
            assert tiles in blocks
            assert fits(tiles, shape)
            assert rows == 1 or rows % tiles.rows == 0  # no copy without padding


def test_units_of_32_take_fewer_rows():
    """128 would spill registers, as the compiler says."""
    most = [max(t.rows for t in usable(Shape(4096, 1152, 1152, 4, 2, u))) for u in (32, 64, 128)]
    assert most == [96, 128, 128]


def test_few_tokens_take_small_blocks():
    few, many = (tiles_by_arithmetic(Shape(rows, 1152, 1152, 4, 2)) for rows in (512, 16384))
    assert few.rows * few.columns < many.rows * many.columns


def test_few_rows_do_not_pay_for_unpacking_to_16_bits():
    narrow, wide = (Shape(512, 1152, 4608, 4, 2, 128, x_bits) for x_bits in (8, 16))
    assert tiles_by_arithmetic(narrow).rows < tiles_by_arithmetic(wide).rows


def test_measured_blocks_are_taken_on_their_device_and_near_their_shape(monkeypatch):
    own = Tiles(96, 64, 6)
    shape = Shape(4096, 1152, 1152, 4, 2)
    row = {"shape": dataclasses.asdict(shape), "tiles": dataclasses.asdict(own)}
    table = TABLE.rows_of({"H": [row]}, "H")
    assert table == {shape: own}
    assert TABLE.rows_of({"H": [row]}, "another") == {}
    monkeypatch.setattr(Table, "device", lambda self: "H")
    monkeypatch.setattr(measured, "packaged", lambda file: {"H": [row]})
    assert chosen_tiles(shape) == own
    assert chosen_tiles(dataclasses.replace(shape, rows=3000)) == own
    for other in ({"rows": 512}, {"width": 3456}, {"bits": 8}, {"unit": 128}, {"elements": "fp8"}):
        far = dataclasses.replace(shape, **other)
        assert chosen_tiles(far) == tiles_by_arithmetic(far)


def test_blocks_are_those_that_let_the_kernel_compute_what_follows(monkeypatch):
    shape = Shape(4096, 1152, 1152, 4, 4)
    wide = Tiles(96, 64, 4)
    monkeypatch.setattr(Table, "rows", lambda _: {dataclasses.replace(shape, itemsize=2): wide})
    assert chosen_tiles(shape) == wide  # measured with another dtype of the result
    allowed = lambda tiles: 256 % tiles.rows == 0  # noqa: E731
    chosen = chosen_tiles(shape, allowed)
    assert allowed(chosen)
    assert chosen == tiles_by_arithmetic(shape, allowed)
    assert chosen_tiles(shape, lambda tiles: False) == tiles_by_arithmetic(shape)
