"""The wheel and the source archive hold what a user needs, and nothing that does not belong there."""

from __future__ import annotations

import subprocess
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from test_packaging import package_folders

ROOT = Path(__file__).resolve().parent.parent
MEBIBYTE = 1 << 20

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns the folder with a wheel and a source archive of the tracked files."""
    folder = tmp_path_factory.mktemp("built")
    files = run("git", "ls-files", cwd=ROOT).split()
    for name in files:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    venv.create(folder / "tools", with_pip=True)
    tools = folder / "tools/bin/python"
    run(tools, "-m", "pip", "install", "-q", "build", cwd=folder)
    run(tools, "-m", "build", "--outdir", folder / "dist", folder / "source", cwd=folder)
    return folder / "dist"


def test_the_wheel_holds_every_package_and_its_types(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 8 * MEBIBYTE
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_string(archive.read(info).decode())
        entries = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    for package in package_folders():
        assert f"{package.replace('.', '/')}/__init__.py" in names
    assert {"qdit_jax/py.typed", "qdit_convert/py.typed"} <= names
    assert "qdit_jax/assets/demo_dit.safetensors" in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"qdit_jax", "qdit_convert", info.partition("/")[0]}
    assert metadata["Name"] == "qdit-jax"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "qdit = qdit_jax.cli:main" in entries


def test_the_source_archive_builds_the_same(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as found:
        names = {name.partition("/")[2] for name in found.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "convert/api.py"} <= names


def test_it_runs_in_a_bare_environment(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare/bin/python"
    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    assert "qdit" in run(tmp_path / "bare/bin/qdit", "--version", cwd=tmp_path)
    assert "best" in run(tmp_path / "bare/bin/qdit", "methods", cwd=tmp_path)
    assert run(python, "-c", "import sys, qdit_jax; print('jax' in sys.modules)", cwd=tmp_path)
