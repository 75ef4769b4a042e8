"""The wheel and the source archive hold what a user needs, and nothing that does not belong there."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path
from shutil import copy, which

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
    assert wheel.stat().st_size < 10 * MEBIBYTE  # the weights of three demonstrations
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


def interpreter(version: str) -> str | None:
    """Returns a Python of that version which runs; None if there is none."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}*/bin/python"))
    for found in (which(f"python{version}"), *map(str, pyenv)):
        if (
            found
            and not subprocess.run([found, "-c", "import venv"], capture_output=True).returncode
        ):
            return found
    return None


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_it_runs_in_a_bare_environment(built, tmp_path, version):
    (wheel,) = built.glob("*.whl")
    if (base := interpreter(version)) is None:
        pytest.skip(f"there is no Python {version} here.")
    run(base, "-m", "venv", tmp_path / "bare", cwd=tmp_path)
    python = tmp_path / "bare/bin/python"
    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    assert version in run(tmp_path / "bare/bin/qdit", "--version", cwd=tmp_path)
    assert "qdit" in run(tmp_path / "bare/bin/qdit", "--version", cwd=tmp_path)
    assert "best" in run(tmp_path / "bare/bin/qdit", "methods", cwd=tmp_path)
    assert run(python, "-c", "import sys, qdit_jax; print('jax' in sys.modules)", cwd=tmp_path)


@pytest.fixture(scope="module")
def versions(built):
    """Returns what tells the version of a tree."""
    tools = built.parent / "tools/bin/python"
    run(tools, "-m", "pip", "install", "-q", "setuptools", "setuptools-scm", cwd=built)
    return lambda tree: run(tools, "-m", "setuptools_scm", cwd=tree).strip()


def test_the_version_is_the_tag_else_the_one_of_the_tree(versions, tmp_path):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools_scm"]
    fallback = settings["fallback_version"]
    assert f"\nversion: {fallback}\n" in (ROOT / "CITATION.cff").read_text()
    text = (ROOT / "qdit_jax" / "__init__.py").read_text()
    assert re.search(r'^SOURCE_VERSION = "(.*)"', text, re.MULTILINE)[1] == fallback
    copy(ROOT / "pyproject.toml", tmp_path)
    assert versions(tmp_path) == fallback
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    run("git", "init", "-q", cwd=tmp_path)
    run("git", "add", ".", cwd=tmp_path)
    run(*git, "commit", "-qm", "one", cwd=tmp_path)
    assert re.match(r"0\.1(\.1)?\.dev\d+\+g", versions(tmp_path))
    run(*git, "tag", "v0.2.0", cwd=tmp_path)
    assert versions(tmp_path) == "0.2.0"
