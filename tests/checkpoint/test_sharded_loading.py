"""Arrays arrive with the sharding asked for, and no device is ever given more than its own part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).with_name("sharded_worker.py")


def test_packed_arrays_are_restored_straight_into_their_shards(tmp_path):
    # Eight devices need a process of their own, which loads a folder and a file.
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, str(WORKER), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for form, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["num_split"] > 10, form
        assert found["differing"] == [], form
        assert found["wrong_sharding"] == [], form
        assert found["too_large"] == [], form
