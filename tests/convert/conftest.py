"""Fixtures of the conversion's tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "experiments" / "benchmarks")]

from convert_samples import dit_shapes, random_arrays  # noqa: E402
from torch_file import write_old_torch_file, write_torch_file  # noqa: E402


@pytest.fixture
def dit() -> dict[str, np.ndarray]:
    """Returns a small DiT in the facebook layout."""
    return random_arrays(dit_shapes())


@pytest.fixture
def pt(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes its argument as `model.pt`."""

    def write(content: Any, **settings: Any) -> Path:
        path = tmp_path / "model.pt"
        write_torch_file(path, content, **settings)
        return path

    return write


@pytest.fixture(params=[write_torch_file, write_old_torch_file], ids=["zip", "old"])
def either(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Returns a function that writes its argument in one of torch's two formats."""

    def write(content: Any) -> Path:
        path = tmp_path / "either.pt"
        request.param(path, content)
        return path

    return write
