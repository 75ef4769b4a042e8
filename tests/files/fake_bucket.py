"""A store of objects in memory, registered with fsspec as `gs://`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry


class FakeBucket(MemoryFileSystem):
    """`gs://` in memory; a folder is there as long as a file is in it, as in a store of objects."""

    protocol = ("gcs", "gs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        for name in ("gcs://", "gs://"):
            path = path.removeprefix(name)
        return "/" + path.strip("/") if path.strip("/") else ""


@contextlib.contextmanager
def fake_bucket() -> Iterator[type[FakeBucket]]:
    """Yields the class whose `store` holds all objects by name; it is empty at first."""
    FakeBucket.store.clear()
    FakeBucket.pseudo_dirs[:] = [""]
    before = dict(_registry)
    fsspec.register_implementation("gcs", FakeBucket, clobber=True)
    fsspec.register_implementation("gs", FakeBucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    FakeBucket.clear_instance_cache()
    try:
        yield FakeBucket
    finally:
        backend.fsspec_backend._get_filesystem.cache_clear()
        for name in ("gcs", "gs"):
            _registry.pop(name, None)
        _registry.update(before)
