"""Shared fixtures: where reference arrays live, and annotation checking of the whole package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(["qdit_jax", "qdit_convert"], "beartype.beartype")

HERE = Path(__file__).resolve().parent
GOLDEN_FOLDERS = (HERE / "goldens", HERE.parent.parent / "shared" / "goldens")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Returns a function from a reference file's name to its path; skips the test if it is absent."""

    def find(name: str) -> Path:
        for folder in GOLDEN_FOLDERS:
            if (folder / name).exists():
                return folder / name
        pytest.skip(f"reference file {name} is not available")

    return find
