"""Prepared conditions, their null entries and sizes of samples, in the library."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIG, random_params, tiny_vae
from toy_family import ROW, ToyVideo, prompts

import qdit_jax as qdit
from qdit_jax.models import FAMILIES, DiT, null_condition_of, without_null
from qdit_jax.sampling import sample_rows, sized_shape, with_sizes


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(FAMILIES, ROW.name, ROW)


MODEL = ToyVideo(depth=1, hidden_size=16)
CHECKPOINT = qdit.Checkpoint(MODEL, random_params(MODEL))
GIVEN = prompts(3, MODEL)
NULL = {"null_text": GIVEN["text"][1:2], "null_text_mask": GIVEN["text_mask"][1:2]}


class NoNull(ToyVideo):
    """The toy network without a learned null caption, as SD3's: the caller brings it."""

    def null_condition(self, condition, params):
        return None


class Sized(ToyVideo):
    """The toy network that takes sizes beside the prompt, which it does not read."""

    def example_condition(self, batch):
        one = jax.ShapeDtypeStruct((batch,), np.float32)
        size = jax.ShapeDtypeStruct((batch, 2), np.float32)
        return {**super().example_condition(batch), "fps": one, "height": one, "size": size}


def generate(condition=GIVEN, checkpoint=CHECKPOINT, **options):
    return qdit.generate(checkpoint, qdit.ddim(2), condition, batch_size=3, **options)


def test_the_null_that_is_given_replaces_the_learned_one():
    denoise_fn = qdit.denoiser(MODEL, CHECKPOINT.params, guidance=3.0)
    plain = qdit.denoiser(MODEL, CHECKPOINT.params, guidance=None)
    x = np.random.default_rng(0).standard_normal((3, *MODEL.sample_shape())).astype(np.float32)
    timestep = np.full(3, 500.0, np.float32)
    both = {**GIVEN, **{n: np.repeat(e, 3, axis=0) for n, e in NULL.items()}}
    null = {name: np.repeat(GIVEN[name][1:2], 3, axis=0) for name in GIVEN}
    x, timestep, given, null, both = jax.tree.map(jnp.asarray, (x, timestep, GIVEN, null, both))
    a, b = plain(x, timestep, given), plain(x, timestep, null)
    np.testing.assert_allclose(denoise_fn(x, timestep, both), b + 3 * (a - b), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(plain(x, timestep, both), a)
    assert set(without_null(both)) == set(GIVEN)


def test_one_null_serves_all_samples():
    repeated = {name: np.repeat(entry, 3, axis=0) for name, entry in NULL.items()}
    one, many = (generate({**GIVEN, **null}, guidance=2.0) for null in (NULL, repeated))
    np.testing.assert_array_equal(one, many)
    assert np.abs(one - generate(guidance=2.0)).max() > 1e-3


def test_a_network_without_a_null_of_its_own_needs_one():
    model = NoNull(depth=1, hidden_size=16)
    checkpoint = dataclasses.replace(CHECKPOINT, model=model)
    with pytest.raises(
        ValueError, match="no null condition of its own, which guidance needs; give"
    ):
        generate(checkpoint=checkpoint)
    found = generate({**GIVEN, **NULL}, checkpoint)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(
        generate(checkpoint=checkpoint, guidance=None), generate(guidance=None)
    )


@pytest.mark.parametrize(
    ("null", "message"),
    [
        ({"null_text": NULL["null_text"]}, "null_text_mask is missing beside null_text"),
        ({**NULL, "null_pooled": np.ones((1, 3))}, "null_pooled is the null of pooled, which"),
        ({**NULL, "null_text": GIVEN["text"][:2]}, "null_text has 2 rows and text has 3"),
    ],
)
def test_null_entries_that_do_not_fit_are_refused(null, message):
    with pytest.raises(ValueError, match=message):
        generate({**GIVEN, **null})


def test_samples_of_another_size_start_from_the_seed_alone():
    small, whole = (generate(shape=shape) for shape in ((3, 4, 8, 4), None))
    assert small.shape == (3, 3, 4, 8, 4)
    assert whole.shape == (3, *MODEL.sample_shape())
    other = {name: entry[1:] for name, entry in GIVEN.items()}
    assert not np.allclose(generate(other, shape=(3, 4, 8, 4))[0], small[1])
    np.testing.assert_array_equal(generate(shape=MODEL.sample_shape()), whole)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 4, 4), r"the network cannot take samples of shape \(2, 5, 4, 4\) with text"),
        ((4, 4, 4), r"frames, rows, columns, channels: \(2, 4, 4, 4\) by default"),
        ((2, 4, 4, 3), r"shape=\(2, 4, 4, 3\) does not fit the network"),
        ((2, 0, 4, 4), r"shape\[1\]=0 is not supported"),
    ],
)
def test_a_size_that_the_network_cannot_take_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        generate(shape=shape)


def test_a_network_of_one_size_says_so_in_its_own_words():
    model = DiT(**CONFIG)
    checkpoint = qdit.Checkpoint(model, random_params(model))
    rows, columns, channels = model.sample_shape()
    with pytest.raises(ValueError, match=r"x has shape .* this model takes"):
        generate([0, 1], checkpoint, shape=(2 * rows, columns, channels))


def test_rows_of_layers_follow_size_and_text():
    short = {name: entry[:, :4] for name, entry in GIVEN.items()}
    rows = sample_rows(MODEL, (2, 8, 4, 4), short)
    assert rows["patch"] == 2 * sample_rows(MODEL, None, None)["patch"] == 16
    assert rows["caption"] == 4


def test_sizes_are_of_what_comes_out():
    decoded = dataclasses.replace(CHECKPOINT, vae=tiny_vae())
    assert sized_shape(decoded, (8, 12), 5) == (5, 4, 6, 4)
    assert sized_shape(CHECKPOINT, (8, 12)) == (2, 8, 12, 4)
    assert sized_shape(CHECKPOINT) is None
    with pytest.raises(ValueError, match="2x2 pixels of every latent; use multiples, such as 8x12"):
        sized_shape(decoded, (9, 12))


def test_sizes_beside_the_prompt_follow_from_the_sample():
    model = Sized(depth=1, hidden_size=16)
    plain = dataclasses.replace(CHECKPOINT, model=model)
    decoded = dataclasses.replace(plain, vae=tiny_vae())
    found = with_sizes(decoded, GIVEN, (2, 4, 6, 4), fps=24)
    np.testing.assert_array_equal(found["size"], [[8, 12]] * 3)
    np.testing.assert_array_equal(found["height"], [8] * 3)
    np.testing.assert_array_equal(found["fps"], [24] * 3)
    assert "aspect_ratio" not in found
    own = {**GIVEN, "fps": np.ones(3), "height": np.ones(3), "size": np.ones((3, 2))}
    assert with_sizes(plain, own)["size"] is own["size"]
    with pytest.raises(ValueError, match="fps=None: this network takes frames per second"):
        with_sizes(decoded, GIVEN)
    with pytest.raises(ValueError, match="lacks size, height, of which pixels are counted"):
        with_sizes(plain, GIVEN, fps=8)
    for condition, checkpoint in ((own, plain), (GIVEN, CHECKPOINT)):
        with pytest.raises(ValueError, match="fps=8 has no effect"):
            with_sizes(checkpoint, condition, fps=8)


def test_items_hold_the_null_that_is_given():
    items = qdit.collect_items(
        CHECKPOINT,
        jax.random.key(0),
        2,
        conditions={**GIVEN, **NULL},
        sampler=qdit.ddim(2),
        shape=(2, 4, 6, 4),
    )
    assert set(items.condition) == set(GIVEN)
    assert items.x.shape[1:] == (2, 4, 6, 4)
    half = len(items.x) // 2
    np.testing.assert_allclose(items.condition["text"][half:], [GIVEN["text"][1]] * half, rtol=1e-6)
    found = null_condition_of(MODEL, CHECKPOINT.params, {**GIVEN, **NULL})
    np.testing.assert_array_equal(found["text_mask"], [GIVEN["text_mask"][1]] * 3)
