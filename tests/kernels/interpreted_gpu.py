"""Scripts that interpret Pallas kernels for GPUs, each in a process of its own.

The interpreter runs a warpgroup as a thread of its own that waits for the others, on threads that XLA for
CPU counts by the machine's cores: on two it may wait for ever. `NPROC` is how many XLA believes in, read as
the process begins.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qdit_jax.kernels.level_reasons import version_reason

needs_interpreter = pytest.mark.skipif(
    version_reason() is not None, reason=f"the interpreter for GPUs: {version_reason()}"
)


def printed(script):
    """Returns the JSON that a script of this folder prints."""
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script))],
        env={**os.environ, "NPROC": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
