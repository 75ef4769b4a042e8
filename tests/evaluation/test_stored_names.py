"""Settings that an earlier release stored under another name are read under the present one."""

import json

import pytest

from qdit_jax.errors import UserError
from qdit_jax.evaluation import open_run
from qdit_jax.evaluation.store import RUN_FILE, SHARDS


def begun(folder, text):
    """Makes a run of those settings, with a finished shard: without one they would be forgotten."""
    (folder / SHARDS).mkdir()
    (folder / SHARDS / "00000000.npz").write_bytes(b"")
    (folder / RUN_FILE).write_text(text)


STORED = {"seed": 0, "execution": "integer", "walk": "flow", "batch_size": 4}


def test_a_run_with_the_earlier_name_goes_on(tmp_path):
    begun(tmp_path, json.dumps(STORED))
    settings = {"seed": 0, "numerics": "integer", "scheduler": "flow", "batch_size": None}
    found = open_run(tmp_path, settings, {"batch_size": 2})
    assert found == {"seed": 0, "numerics": "integer", "scheduler": "flow", "batch_size": 4}


def test_other_settings_are_still_refused(tmp_path):
    begun(tmp_path, json.dumps(STORED))
    settings = {"seed": 0, "numerics": "simulated", "scheduler": "flow", "batch_size": 4}
    with pytest.raises(UserError, match="numerics integer, not simulated"):
        open_run(tmp_path, settings, {})


@pytest.mark.parametrize("text", ["[1, 2]", "3", "{"])
def test_a_damaged_file_is_named(tmp_path, text):
    begun(tmp_path, text)
    with pytest.raises(UserError, match=r"run\.json is damaged; remove"):
        open_run(tmp_path, {"seed": 0}, {})
