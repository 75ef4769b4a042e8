"""Sampling, evaluation and calibration by two processes: the results of one, to the bit."""

from __future__ import annotations

import dataclasses
import json
import threading

import jax
import numpy as np
import pytest
from tiny_models import tiny_checkpoint
from two_threads import DictNotes, in_both

import qdit_jax as qdit
from qdit_jax.calibration import collect_items, parts_folder
from qdit_jax.errors import UserError
from qdit_jax.evaluation import SampleFile, locked
from qdit_jax.methods import CalibrationData, qdit_release_items, spread_items
from qdit_jax.processes import LostWorkerError
from qdit_jax.types import untold

SAMPLER = qdit.ddim(3)
LABELS = np.arange(7) % 5


@pytest.fixture(scope="module")
def full():
    return tiny_checkpoint(in_channels=1)


def job(checkpoint, **changes):
    return SampleFile(checkpoint, SAMPLER, LABELS, **{"batch_size": 2, **changes})


def unfinished(out):
    return out.with_name(f".{out.name}.unfinished")


@pytest.fixture(scope="module")
def alone(full, tmp_path_factory):
    """The bytes that one process writes."""
    out = tmp_path_factory.mktemp("alone") / "samples.npz"
    job(full).write(out)
    return out.read_bytes()


def test_two_processes_sample_as_one(full, alone, tmp_path):
    out = tmp_path / "samples.npz"
    news = {0: [], 1: []}

    def call(processes):
        tell = news[processes.index].append
        job(full).write(out, processes=processes, progress_fn=tell)

    assert in_both(call) == [None, None]
    assert out.read_bytes() == alone
    assert list(tmp_path.iterdir()) == [out]
    # Of batches 2, 2, 2, 1 the first process computes two and the second two.
    assert [sum(one.done for one in news[i]) for i in (0, 1)] == [4, 3]
    assert [news[i][0].total for i in (0, 1)] == [4, 3]


class SaysWhenDone(DictNotes):
    """Notes that say when the first process has done its share."""

    def __init__(self):
        super().__init__()
        self.is_done = threading.Event()

    def written(self, name):
        if name.endswith("are written/0"):
            self.is_done.set()


def of_first_alone(call):
    """Returns what `call(processes, progress_fn)` raised in the first process, the second one killed.

    The second is killed before it has computed anything, when the first has done its share.
    """
    notes = SaysWhenDone()

    def killed(event):
        assert notes.is_done.wait(60)
        raise RuntimeError("killed")

    return in_both(lambda p: call(p, untold if p.is_first else killed), notes)[0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_a_lost_run_has_sampled_is_kept_for_any_number_of_processes(
    full, alone, tmp_path, count, capsys
):
    out = tmp_path / "samples.npz"

    def call(processes, progress_fn):
        job(full).write(out, processes=processes, progress_fn=progress_fn)

    error = of_first_alone(call)
    assert isinstance(error, LostWorkerError)
    kept = sorted(path.name for path in (unfinished(out) / "shards").iterdir())
    assert kept == ["00000000.npz", "00000004.npz"]
    assert not out.exists()

    def again(processes):
        job(full).write(out, processes=processes)

    assert set(in_both(again, count=count)) == {None}
    assert "resuming from 4 of 7 samples" in capsys.readouterr().out
    assert out.read_bytes() == alone


def test_a_folder_is_locked_once_for_all_processes(full, tmp_path):
    out = tmp_path / "samples.npz"
    with locked(unfinished(out)):
        first, second = in_both(lambda processes: job(full).write(out, processes=processes))
    assert isinstance(first, UserError)
    assert "another process writes to" in str(first)
    assert isinstance(second, LostWorkerError)
    assert "another process writes to" in str(second)


def test_processes_with_other_settings_are_refused(full, tmp_path):
    def call(processes):
        job(full, seed=processes.index).write(tmp_path / "samples.npz", processes=processes)

    first, second = in_both(call)
    assert "process 1 was started with other settings than process 0 (seed 0, not 1)" in str(second)
    assert isinstance(first, LostWorkerError)
    assert not unfinished(tmp_path / "samples.npz").exists()


TIMES = ("seconds_per_sample", "compile_seconds", "num_timings")


def figures(summary):
    """Returns a summary without dates and times."""
    models = [{k: v for k, v in one.items() if k not in TIMES} for one in summary["models"]]
    return json.loads(json.dumps({**summary, "models": models, "made": None}))


def test_two_processes_evaluate_as_one(full, tmp_path):
    settings = {"num_samples": 5, "batch_size": 2, "sampler": SAMPLER}  # in pairs: test_two_hosts

    def call(processes):
        given = {"out": tmp_path / f"of-{processes.count}", "processes": processes}
        return qdit.evaluate(full, **settings, **given)

    one = in_both(call, count=1)[0]
    first, second = in_both(call)
    assert figures(first) == figures(second) == figures(one)
    for name in ("samples.npz", "pictures.png"):
        assert (tmp_path / "of-2" / name).read_bytes() == (tmp_path / "of-1" / name).read_bytes()
    with pytest.raises(ValueError, match="several processes need out"):
        raise in_both(lambda processes: qdit.evaluate(full, processes=processes))[0]


def test_a_forced_evaluation_replaces_the_old_one_when_all_are_done(full, tmp_path):
    out = tmp_path / "out"
    settings = {"num_samples": 4, "batch_size": 2, "sampler": SAMPLER, "out": out}
    qdit.evaluate(full, **settings)

    def call(processes):
        return qdit.evaluate(full, seed=1, overwrite=True, processes=processes, **settings)

    assert all(isinstance(found, dict) for found in in_both(call))
    assert json.loads((out / "run.json").read_text())["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def calibrated(full, path, processes, **changes):
    settings = {"batch_size": 2, "sampler": SAMPLER, "hessians": ".*", "num_tokens": 2, **changes}
    stats = qdit.calibrate(
        full, jax.random.key(0), 6, unfinished=path, processes=processes, **settings
    )
    return dataclasses.asdict(stats)


def test_two_processes_calibrate_as_one(full, tmp_path):
    one = in_both(lambda p: calibrated(full, tmp_path / "one.npz", p), count=1)[0]
    for found in in_both(lambda p: calibrated(full, tmp_path / "two.npz", p)):
        equal(found, one)
    assert not (tmp_path / "two.npz").exists()  # nobody's state, but batches
    assert len(list(parts_folder(tmp_path / "two.npz").iterdir())) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_lost_calibration_has_seen_is_kept(full, tmp_path, count):
    path = tmp_path / "lost.npz"
    error = of_first_alone(lambda p, tell: calibrated(full, path, p, progress_fn=tell))
    assert isinstance(error, LostWorkerError)
    assert len(list(parts_folder(path).iterdir())) == 2
    found = in_both(lambda processes: calibrated(full, path, processes), count=count)
    equal(found[0], in_both(lambda p: calibrated(full, None, p), count=1)[0])
    with pytest.raises(UserError, match="other settings"):
        raise in_both(lambda p: calibrated(full, path, p, num_tokens=1), count=2)[0]


def test_processes_that_calibrate_otherwise_are_refused(full, tmp_path):
    path = tmp_path / "x.npz"
    found = in_both(lambda p: calibrated(full, path, p, num_tokens=p.index))
    assert "process 1 was started with other settings than process 0 (its num_tokens" in str(
        found[1]
    )


@pytest.mark.parametrize("collect_fn", [spread_items, qdit_release_items])
def test_two_processes_collect_as_one(full, tmp_path, collect_fn):
    data = CalibrationData(num_samples=7, num_steps=4, batch_size=2, seed=3)

    def call(processes):
        return collect_fn(full, data, unfinished=tmp_path / "parts", processes=processes)

    one = collect_fn(full, data)
    for found in in_both(call):
        equal(found, one)


def test_a_stopped_collection_resumes(full, tmp_path):
    seen = []

    def stop(event):
        seen.append(event.done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    given = {"sampler": SAMPLER, "batch_size": 2, "unfinished": tmp_path / "parts"}
    with pytest.raises(KeyboardInterrupt):
        collect_items(full, jax.random.key(0), 7, progress_fn=stop, **given)
    assert len(list((tmp_path / "parts").iterdir())) == 3
    found = collect_items(full, jax.random.key(0), 7, **given)
    equal(found, collect_items(full, jax.random.key(0), 7, sampler=SAMPLER, batch_size=2))
    with pytest.raises(UserError, match="other settings"):
        collect_items(full, jax.random.key(1), 7, **given)
