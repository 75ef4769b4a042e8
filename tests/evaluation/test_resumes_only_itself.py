"""Unfinished samples and evaluations are taken up by the same job only: every setting, one at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_checkpoint, tiny_vae
from told import Told

import qdit_jax as qdit
from qdit_jax.evaluation import Contender, Protocol, SampleFile, run_evaluation
from qdit_jax.models import DiT


class StoppedError(BaseException):
    """Stands for a kill."""


def stop_after_one_batch(event):
    if event.done:
        raise StoppedError


def last_value_changed(checkpoint):
    leaves, tree = jax.tree.flatten(checkpoint.params)
    last = np.array(leaves[-1])
    last.flat[-1] += 1e-6
    leaves[-1] = jnp.asarray(last)
    return dataclasses.replace(checkpoint, params=jax.tree.unflatten(tree, leaves))


def with_model(checkpoint, **fields):
    return dataclasses.replace(checkpoint, model=checkpoint.model.clone(**fields))


def with_vae(checkpoint, vae):
    return dataclasses.replace(checkpoint, vae=vae)


FULL = tiny_checkpoint()
DECODED = with_vae(FULL, tiny_vae())
LABELS = np.array([0, 1, 2, 3])
JOB = SampleFile(DECODED, qdit.ddim(2), LABELS, batch_size=2, settings={"steps": "2"})
# Each changes one field; a field may have several.
OTHER_SAMPLING = {
    "sampler, steps": {"sampler": qdit.ddim(3)},
    "sampler, eta": {"sampler": qdit.ddim(2, eta=0.5)},
    "sampler, clip": {"sampler": qdit.ddim(2, clip=1.0)},
    "seed": {"seed": 1},
    "guidance": {"guidance": 2.0},
    "guidance_channels, all": {"guidance_channels": None},
    "guidance_channels, number": {"guidance_channels": 2},
    "numerics": {"numerics": "integer"},
    "batch_size": {"batch_size": 4},
}
OTHER_JOBS = {
    **OTHER_SAMPLING,
    "checkpoint, one value": {"checkpoint": last_value_changed(DECODED)},
    "checkpoint, its network": {"checkpoint": with_model(DECODED, mlp_norm_eps=1e-5)},
    "checkpoint, no autoencoder": {"checkpoint": FULL},
    "checkpoint, one value of the autoencoder": {
        "checkpoint": with_vae(FULL, last_value_changed(tiny_vae()))
    },
    "checkpoint, the autoencoder's scale": {
        "checkpoint": with_vae(FULL, with_model(tiny_vae(), scaling_factor=0.2))
    },
    "sampler, kind": {"sampler": qdit.ddpm(2)},
    "condition, values": {"condition": np.array([0, 1, 2, 4])},
    "condition, order": {"condition": LABELS[::-1].copy()},
    "condition, count": {"condition": LABELS[:3]},
    "settings": {"settings": {"steps": "ddim2"}},
    "num_samples": {"num_samples": 5},
    "prompts": {"prompts": ("a", "b", "c", "d")},
    "shape": {"shape": (4, 4, 4)},
    "first_frames": {"first_frames": np.zeros((4, 1, 4, 4, 4), np.float32)},
}
# How many devices share a sample, and where modulation is computed, change no value beyond rounding.
SAME_VALUES = {"shard_tokens", "hoist"}
PROTOCOL = Protocol(qdit.ddim(2), {"steps": 2}, num_samples=4, batch_size=2)
CONTENDERS = (Contender("a", FULL), Contender("b", last_value_changed(FULL)))
OTHER_PROTOCOLS = {
    **OTHER_SAMPLING,
    "record": {"record": {"steps": 3}},
    "num_samples": {"num_samples": 6},
    "conditions": {"conditions": np.array([1, 2])},
    "shape": {"shape": (4, 4, 4)},
    "num_probed": {"num_probed": 0},
}
OTHER_CONTENDERS = {
    "one value": (CONTENDERS[0], Contender("b", FULL)),
    "the network": (CONTENDERS[0], Contender("b", with_model(FULL, mlp_norm_eps=1e-5))),
    "order": CONTENDERS[::-1],
    "one more": (*CONTENDERS, Contender("c", FULL)),
    "one less": CONTENDERS[:1],
    "an autoencoder": (CONTENDERS[0], Contender("b", with_vae(CONTENDERS[1].checkpoint, tiny_vae()))),
}  # fmt: skip


def fields_of(cls):
    return {field.name for field in dataclasses.fields(cls)}


def test_every_setting_is_changed_below():
    """A new setting fails here until it has a line of its own."""
    for cls, changes in ((SampleFile, OTHER_JOBS), (Protocol, OTHER_PROTOCOLS)):
        counted = fields_of(cls) - SAME_VALUES
        assert {name.partition(",")[0] for name in changes} == counted
        assert {field for change in changes.values() for field in change} == counted
    assert fields_of(Contender) == {"title", "checkpoint"}
    assert isinstance(FULL.model, DiT)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """Returns where one of two batches of `JOB` was made."""
    out = tmp_path_factory.mktemp("samples") / "out.npz"
    with pytest.raises(StoppedError):
        JOB.write(out, progress_fn=stop_after_one_batch)
    return out


@pytest.mark.parametrize("name", OTHER_JOBS)
def test_other_samples_are_refused(unfinished, name):
    other = dataclasses.replace(JOB, **OTHER_JOBS[name])
    with pytest.raises(qdit.UserError, match="holds a run with other settings"):
        other.write(unfinished)
    assert len(list(unfinished.parent.glob(".out.npz.unfinished/shards/0*.npz"))) == 1


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Returns a folder in which one of two batches was made."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    with pytest.raises(StoppedError):
        run_evaluation(CONTENDERS, PROTOCOL, folder, stop_after_one_batch)
    return folder


@pytest.mark.parametrize("name", OTHER_PROTOCOLS)
def test_another_protocol_is_refused(evaluated, name):
    other = dataclasses.replace(PROTOCOL, **OTHER_PROTOCOLS[name])
    with pytest.raises(qdit.UserError, match="holds a run with other settings"):
        run_evaluation(CONTENDERS, other, evaluated)


@pytest.mark.parametrize("name", OTHER_CONTENDERS)
def test_other_contenders_are_refused(evaluated, name):
    with pytest.raises(qdit.UserError, match="holds a run with other settings"):
        run_evaluation(OTHER_CONTENDERS[name], PROTOCOL, evaluated)


def test_the_same_jobs_go_on(unfinished, evaluated):
    seen = Told()
    retitled = [dataclasses.replace(c, title=c.title * 2) for c in CONTENDERS]
    run_evaluation(retitled, dataclasses.replace(PROTOCOL, batch_size=None), evaluated, seen.tell)
    assert seen.counts == [2, 2]
    seen.clear()
    dataclasses.replace(JOB, batch_size=None).write(unfinished, progress_fn=seen.tell)
    assert seen.counts == [2, 2]
    assert np.load(unfinished)["arr_0"].shape == (4, 8, 8, 3)
