"""Progress bars: on terminals only, from the first update on, with an honest time left."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from qdit_jax.cli.progress import Bar, is_shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Streams:
    """`sys` with another stderr."""

    def __init__(self, stderr):
        self.stderr = stderr

    @property
    def stdout(self):
        return sys.stdout


@pytest.fixture
def terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("qdit_jax.cli.progress.sys", Streams(stream))
    return stream


@pytest.fixture(autouse=True)
def loud(caplog):
    caplog.set_level(logging.INFO, "qdit_jax")


def test_a_bar_appears_at_its_first_update(terminal):
    with Bar(4, "sample", "sampling") as bar:
        assert terminal.getvalue() == ""
        bar.update(2)
        assert "sampling" in terminal.getvalue()
        bar.update(2)
    assert "4/4" in terminal.getvalue()


def test_no_bar_before_an_error(terminal):
    with pytest.raises(RuntimeError), Bar(4, "sample"):
        raise RuntimeError
    assert terminal.getvalue() == ""


def test_quiet_or_no_terminal_means_no_bar(terminal, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, "qdit_jax")
    with Bar(4, "sample") as bar:
        bar.update(4)
        bar.expect(8)
        bar.note(best="1")
    assert terminal.getvalue() == ""
    monkeypatch.setattr("qdit_jax.cli.progress.sys", Streams(io.StringIO()))
    caplog.set_level(logging.INFO, "qdit_jax")
    assert not is_shown()


def test_what_an_earlier_run_did_counts_but_not_for_the_speed(terminal):
    with Bar(10, "sample", resumes=True) as bar:
        bar.update(6)
        assert (bar.bar.n, bar.bar.initial) == (6, 6)
        bar.update(4)
        assert bar.bar.n == 10
    with Bar(10, "sample", resumes=True) as bar:
        bar.update(0)
        assert bar.bar.initial == 0


def test_the_time_left_counts_from_the_start_not_from_the_first_update(terminal):
    bar = Bar(10, "sample")
    bar.began -= 100
    bar.update(1)
    assert bar.bar.format_dict["elapsed"] >= 100
    bar.close()


def test_a_total_can_grow(terminal, capsys):
    bar = Bar(0, "rollout")
    bar.expect(3)
    bar.note(best="0.5")
    bar.update(2)
    bar.write("a line")
    bar.update(2)
    assert bar.bar.total == 4
    assert "best=0.5" in terminal.getvalue()
    assert capsys.readouterr().out == "a line\n"
    bar.close()
