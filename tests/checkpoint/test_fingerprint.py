"""Fingerprints: everything that determines a result changes them, and nothing else does."""

from __future__ import annotations

import dataclasses
from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.checkpoint import digest, fingerprint, first_difference


def scaled(factor):
    return lambda x: factor * x


def decorated(function, factor):
    @wraps(function)
    def run(x):
        return factor * function(x)

    return run


FACTOR = 2.0


def by_the_module(x):
    return helped(x)


def helped(x):
    return (lambda y: y * FACTOR)(x)


@dataclasses.dataclass(frozen=True)
class Rule:
    size: int
    weights: np.ndarray


def test_plain_values_stay_readable():
    assert fingerprint(steps=3, name="x", guidance=None) == {
        "steps": 3, "name": "x", "guidance": None,
    }  # fmt: skip


def test_every_byte_of_an_array_counts():
    a = np.zeros(5000, np.float32)
    b = a.copy()
    b[-1] = 1e-30
    assert digest(a) == digest(jnp.asarray(a)) == digest(a.copy())
    assert len({digest(x) for x in (a, b, a.astype(np.float64), a.reshape(2, -1), a[:-1])}) == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (scaled(2.0), scaled(3.0)),
        (lambda x: x + 1, lambda x: x + 2),
        (partial(scaled, 1), partial(scaled, 2)),
        (jax.jit(scaled(2.0)), jax.jit(scaled(3.0))),
        (Rule(1, np.zeros(2)), Rule(1, np.ones(2))),
        (qdit.ddim(4), qdit.ddim(5)),
        (qdit.ddim(4), qdit.ddim(4, eta=0.5)),
        (jax.random.key(0), jax.random.key(1)),
        (jax.random.key(0), jax.random.key(0, impl="rbg")),
        (decorated(scaled(1.0), 2.0), decorated(scaled(1.0), 3.0)),
        (decorated(scaled(1.0), 2.0), decorated(scaled(2.0), 2.0)),
        (jax.vmap(scaled(2.0)), jax.vmap(scaled(3.0))),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
        ([1, [2]], [[1], 2]),
        (1, 1.0),
        (tiny_checkpoint().model, tiny_checkpoint(num_classes=6).model),
    ],
)
def test_what_differs_has_another_digest(one, other):
    assert digest(one) != digest(other)


def test_the_same_has_the_same_digest():
    assert digest(scaled(2.0)) == digest(scaled(2.0))
    assert digest(qdit.ddim(4)) == digest(qdit.ddim(4))
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    one, other = tiny_checkpoint(), tiny_checkpoint()
    assert digest(one) == digest(other)
    recipe = qdit.Recipe.preset("w4a8", one, group_size=16)
    quantized = qdit.quantize_params(one.params, recipe=recipe)
    assert digest(quantized) == digest(qdit.quantize_params(other.params, recipe=recipe))
    assert digest(quantized) != digest(one.params)


def test_values_of_the_module_that_a_function_reads_count(monkeypatch):
    before = digest(by_the_module)
    assert before == digest(by_the_module)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    changed = digest(by_the_module)
    monkeypatch.setitem(globals(), "FACTOR", jnp.ones(2))
    assert len({before, changed, digest(by_the_module)}) == 3


def test_what_has_no_content_is_refused():
    with pytest.raises(TypeError, match="a generator has no content"):
        digest(i for i in range(3))


def test_the_first_difference_is_named():
    assert first_difference({"a": 1, "b": 2}, {"a": 1, "b": 2}) is None
    assert first_difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == "b"
    assert first_difference({"a": 1}, {"a": 1, "c": 3}) == "c"
