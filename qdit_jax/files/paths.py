"""Paths: local, or a URL such as `gs://bucket/name`, and whether one contains another."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from qdit_jax.errors import UserError

PathLike: TypeAlias = str | os.PathLike
# A local `Path`, or etils' path of a URL: no subclass, but with the same methods.
if TYPE_CHECKING:
    AnyPath: TypeAlias = Path
else:
    AnyPath = os.PathLike
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}


def as_path(path: PathLike) -> AnyPath:
    """Returns a local `Path`, or for a URL such as `gs://bucket/name` etils' path.

    `gs:/bucket/name`, which `pathlib` turns such a URL into, counts as that URL.

    Raises:
        UserError: if such URLs are not supported, or need a package that is not installed.
    """
    text = os.fspath(path)
    scheme, colon, rest = text.partition(":/")
    is_url = bool(colon) and (scheme in PACKAGES or rest.startswith("/"))
    if not is_url or not re.fullmatch(r"[A-Za-z][\w+.-]+", scheme):
        return Path(text)
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise UserError(f"{text}: {scheme}:// is not supported; use a local path, or {known}.")
    import fsspec
    from etils import epath

    try:
        fsspec.get_filesystem_class({"gs": "gcs"}.get(scheme, scheme))
    except (ImportError, ValueError):
        package = PACKAGES[scheme]
        raise UserError(f"{text} needs the package {package}: pip install {package}") from None
    return epath.Path(f"{scheme}://{rest.lstrip('/')}")


def is_remote(path: PathLike) -> bool:
    """Returns whether `path` is a URL."""
    return not isinstance(as_path(path), Path)


@contextmanager
def local_copy(path: PathLike, keep: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """Yields `path` where it is local, else a temporary copy of that file or folder.

    Of a folder, only files are copied whose path inside it `keep` accepts.
    """
    path = as_path(path)
    if not is_remote(path):
        yield path
        return
    if not path.exists():
        raise UserError(f"{path} does not exist.")
    with tempfile.TemporaryDirectory(prefix="qdit-") as parent:
        local = Path(parent) / path.name
        if not path.is_dir():
            copy_file(path, local)
        for name in files_below(path) if path.is_dir() else ():
            if keep(name):
                copy_file(path / name, local / name)
        yield local


def files_below(folder: AnyPath) -> list[str]:
    """Returns the paths of all files in `folder`, relative to it."""
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += [f"{entry.name}/{name}" for name in files_below(entry)]
        else:
            found.append(entry.name)
    return sorted(found)


def num_bytes(path: PathLike) -> int:
    """Returns the bytes of a file, or of all files below a folder."""
    path = as_path(path)
    if path.is_dir():
        return sum(num_bytes(path / name) for name in files_below(path))
    facts = path.stat()
    return int(facts.st_size if isinstance(path, Path) else facts.length)


def copy_file(source: AnyPath, target: AnyPath) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 24)


def check_apart(path: PathLike, inputs: Iterable[PathLike | None]) -> None:
    """Raises `UserError` if `path` is an input, contains one or lies inside one."""
    out = real(path)
    for given in inputs:
        if given is None:
            continue
        source, relation = real(given), None
        if is_same(out, source):
            relation = "is"
        elif any(is_same(out, parent) for parent in source.parents):
            relation = "contains"
        elif any(is_same(source, parent) for parent in out.parents):
            relation = "lies inside"
        if relation is not None:
            raise UserError(f"{path} {relation} the input {given}; choose another path to write.")


def real(path: PathLike) -> AnyPath:
    """Returns the absolute path without links and `..`."""
    path = as_path(path)
    return path.resolve() if is_remote(path) else Path(os.path.realpath(path))


def is_same(a: AnyPath, b: AnyPath) -> bool:
    """Returns whether two paths name one file or folder, hard links included."""
    if is_remote(a) or is_remote(b):
        return str(a) == str(b)
    try:
        return a == b or os.path.samefile(a, b)
    except OSError:
        return False
