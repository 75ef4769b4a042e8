"""What pyproject.toml installs is what the tree holds: no room and no data file stays at home."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"qdit_jax": ROOT / "qdit_jax", "qdit_convert": ROOT / "convert"}


@pytest.fixture(scope="module")
def setuptools() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def package_folders() -> dict[str, Path]:
    """Returns the folder of every package that holds source."""
    found = {}
    for name, top in FOLDERS.items():
        for folder in {file.parent for file in top.rglob("*.py")}:
            found[".".join((name, *folder.relative_to(top).parts))] = folder
    return found


def test_every_package_is_installed(setuptools):
    assert sorted(setuptools["packages"]) == sorted(package_folders())


def test_every_data_file_is_installed(setuptools):
    missing = []
    for name, folder in package_folders().items():
        patterns = setuptools["package-data"].get(name, [])
        data = [f for f in folder.iterdir() if f.is_file() and f.suffix not in (".py", ".pyc")]
        missing += [f for f in data if not any(f.match(pattern) for pattern in patterns)]
    assert not missing
