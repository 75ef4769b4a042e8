"""Shared fixtures: where reference arrays live, and annotation checking of the whole package."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from golden_files import GOLDEN_FOLDERS, IN_SHARED_ALONE, SHARED
from jaxtyping import install_import_hook

install_import_hook(["qdit_jax", "qdit_convert"], "beartype.beartype")

MAPS = Path("/proc/self/maps")
# Linux allows a process 65,530 maps of memory; each compiled program holds a few, and LLVM dies without.
MOST_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Lets compiled programs go after a module, where there are very many."""
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Returns a function from a reference file's name to its path; an absent one fails the test.

    Skipped are only tests of `IN_SHARED_ALONE`, and only where there is no such folder at all.
    """

    def find(name: str) -> Path:
        for folder in GOLDEN_FOLDERS:
            if (folder / name).exists():
                return folder / name
        if IN_SHARED_ALONE.fullmatch(name) and not SHARED.exists():
            pytest.skip(f"reference file {name} lies in {SHARED} alone, which is absent")
        pytest.fail(
            f"reference file {name} is missing from {' and '.join(map(str, GOLDEN_FOLDERS))}"
        )

    return find
