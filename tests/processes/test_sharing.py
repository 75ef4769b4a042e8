"""How processes share work, meet, agree, and what they say when one is gone."""

from __future__ import annotations

import time

import jax
import pytest
from two_threads import DictNotes, in_both

from qdit_jax import processes as room
from qdit_jax.cli import main
from qdit_jax.errors import UserError
from qdit_jax.processes import (
    ALONE,
    LostWorkerError,
    Processes,
    Watch,
    check_shared,
    naming_lost_workers,
)
from qdit_jax.processes import folders as folders_module
from qdit_jax.processes import watch as watch_module


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_item_is_one_process_s(count):
    items = list(range(11))
    shares = [Processes(index, count).mine(items) for index in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_all_agree_with_the_first_and_wait_for_the_last():
    def call(processes):
        time.sleep(0.3 * processes.index)
        processes.meet("here")
        met = time.monotonic()
        return processes.told("text", f"from {processes.index}"), met

    (first, met), (second, other) = in_both(call)
    assert first == second == "from 0"
    assert abs(met - other) < 0.25


def test_one_process_alone_waits_for_nobody():
    ALONE.meet("here")
    assert ALONE.told("text", "mine") == "mine"
    assert not ALONE.are_several


def test_who_waits_for_a_lost_process_raises():
    notes = DictNotes()
    notes.lost = "process 1 of 2 is gone"
    with pytest.raises(LostWorkerError, match="process 1 of 2 is gone"):
        Processes(0, 2, notes).meet("here")


def test_a_folder_that_another_process_does_not_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(folders_module, "SEEN_WITHIN", 0.3)
    apart = [tmp_path / "a", tmp_path / "b"]
    first, second = in_both(lambda processes: check_shared(apart[processes.index], processes))
    assert isinstance(second, UserError)
    assert "process 1 does not see what process 0 wrote" in str(second)
    assert isinstance(first, LostWorkerError)
    assert "on a disk that all hosts share" in str(first)
    assert in_both(lambda processes: check_shared(tmp_path / "a", processes)) == [None, None]
    assert list((tmp_path / "a").iterdir()) == []


def test_what_jax_raises_among_several_processes_is_a_lost_one(monkeypatch):
    def wrapped():
        try:
            raise jax.errors.JaxRuntimeError("UNKNOWN: Connection closed by peer")
        except jax.errors.JaxRuntimeError as error:
            raise ValueError("the step could not be saved") from error

    with pytest.raises(ValueError, match="could not be saved"), naming_lost_workers():
        wrapped()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LostWorkerError, match="Connection closed by peer"), naming_lost_workers():
        wrapped()
    with pytest.raises(ValueError, match="of our own"), naming_lost_workers():
        raise ValueError("of our own")


class Client:
    """JAX's coordination service as a dict."""

    def __init__(self):
        self.texts = {}

    def key_value_set(self, name, text, allow_overwrite):
        self.texts[name] = text

    def key_value_dir_get(self, name):
        return [(key, text) for key, text in self.texts.items() if key.startswith(f"{name}/")]


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {"LOST_AFTER": 0.6, "PERIOD": 0.1, "GRACE": 0.2}.items():
        monkeypatch.setattr(watch_module, name, seconds)


def waited(is_so, seconds=10):
    assert room.comes_true(is_so, seconds)


def test_a_process_without_signs_of_life_is_named_and_who_does_not_check_is_ended(quick):
    said = []
    client = Client()
    other = Watch(client, 1, 2, said.append)
    mine = Watch(client, 0, 2, said.append)
    time.sleep(1)
    mine.check()  # both give signs of life
    other.is_over.set()
    waited(lambda: said)
    assert "process 1 of 2 has given no sign of life" in said[0]
    assert "start all processes again with the same command" in said[0]
    with pytest.raises(LostWorkerError, match="process 1 of 2"):
        mine.check()


def test_the_error_of_one_process_is_told_by_the_others(quick):
    said = []
    client = Client()
    mine = Watch(client, 0, 2, said.append)
    other = Watch(client, 1, 2, said.append)
    other.end("error: no room left")
    waited(lambda: mine.lost)
    with pytest.raises(LostWorkerError, match="process 1 of 2 ended: error: no room left"):
        mine.check()
    time.sleep(0.5)
    assert said == []  # who checks ends by itself


def test_without_the_coordination_service_process_0_is_gone(quick):
    client = Client()
    mine = Watch(client, 1, 2, print)

    def gone(*given, **named):
        raise RuntimeError("UNAVAILABLE: Socket closed")

    client.key_value_set = client.key_value_dir_get = gone
    waited(lambda: mine.lost)
    with pytest.raises(LostWorkerError, match=r"process 0 of 2 is gone \(UNAVAILABLE"):
        mine.check()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--coordinator", "localhost:1"], "must be given together"),
        (["--coordinator", "localhost"], "'localhost' is no address; use HOST:PORT"),
        (
            ["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2 is not one of --num-processes 2",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["sample", "evaluate", "calibrate", "search"])
def test_processes_that_cannot_be_numbered_are_refused(verb, options, said, capsys):
    out = {"sample": ["--out", "x.npz"], "evaluate": []}.get(verb, ["x.npz"])
    assert main([verb, "ckpt", *out, *options]) == 2
    assert said in capsys.readouterr().err


def test_other_verbs_refuse_several_processes(capsys):
    assert main(["verify", "a", "--against", "b", "--coordinator", "10.0.0.1:1"]) == 2
    assert "only calibrate, search, sample and evaluate share" in capsys.readouterr().err
    files = ["evaluate", "--samples", "a.npz", "--reference", "demo"]
    assert main([*files, "--distributed"]) == 2
    assert "--distributed has no effect" in capsys.readouterr().err
