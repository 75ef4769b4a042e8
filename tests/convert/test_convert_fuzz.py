"""Damaged files give a sentence or, where nothing can tell, other values: never anything else."""

from __future__ import annotations

import io
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from convert_samples import dit_shapes, random_arrays, write_safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_file import Object, write_old_torch_file, write_torch_file

from qdit_convert import convert, describe, read_model
from qdit_jax.errors import UserError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def original(suffix: str) -> bytes:
    arrays = random_arrays(dit_shapes(8, 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        if suffix == ".safetensors":
            write_safetensors(path, arrays)
        else:
            args = Object("argparse.Namespace", (), {"num_classes": 10})
            write = write_old_torch_file if suffix == ".old.pt" else write_torch_file
            write(path, {"ema": arrays, "args": args})
        return path.read_bytes()


def attempt(data: bytes, suffix: str) -> bool:
    """Returns whether `data` converts; anything but a `UserError` fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{suffix}"
        path.write_bytes(data)
        message = complaint(read_model, path, num_heads=2)
        if message is None:
            return True
        assert "\n" not in message
        assert len(message) < 2000
        complaint(convert, path, Path(folder) / "out", num_heads=2)
        complaint(describe, path)
        assert [p.name for p in Path(folder).iterdir()] == [path.name]
        return False


def complaint(function: Callable, *args: Any, **kwargs: Any) -> str | None:
    """Returns the message of the `UserError` that a call raises, or None if it succeeds."""
    try:
        function(*args, **kwargs)
    except UserError as error:
        return str(error)
    return None


SUFFIX = st.sampled_from([".pt", ".old.pt", ".safetensors"])


@pytest.mark.parametrize("suffix", [".pt", ".old.pt", ".safetensors"])
def test_the_undamaged_file_converts(suffix):
    assert attempt(original(suffix), suffix)


@QUICK
@given(SUFFIX, st.data())
def test_truncated_files(suffix, data):
    whole = original(suffix)
    length = data.draw(st.integers(0, len(whole) - 1))
    assert not attempt(whole[:length], suffix)


def damaged(whole: bytes, data: st.DataObject, first: int, last: int) -> bytes:
    out = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        out[data.draw(st.integers(first, last - 1))] = data.draw(st.integers(0, 255))
    return bytes(out)


@QUICK
@given(SUFFIX, st.data())
def test_flipped_bytes_anywhere(suffix, data):
    whole = original(suffix)
    attempt(damaged(whole, data, 0, len(whole)), suffix)


@QUICK
@given(st.data())
def test_flipped_bytes_in_the_pickle(data):
    whole = original(".pt")
    # Without its checksum the pickle is read whatever it holds.
    start = whole.index(b"\x80\x02}(")
    end = whole.index(b"byteorder")
    attempt(damaged(without_checksums(whole), data, start, end), ".pt")


@QUICK
@given(st.data())
def test_flipped_bytes_in_the_pickles_of_the_old_format(data):
    whole = original(".old.pt")
    attempt(damaged(whole, data, 12, len(whole) // 3), ".old.pt")


@QUICK
@given(st.data())
def test_flipped_bytes_in_the_directory(data):
    whole = original(".pt")
    attempt(damaged(whole, data, whole.index(b"PK\x01\x02"), len(whole)), ".pt")


@QUICK
@given(st.data())
def test_flipped_bytes_in_the_safetensors_header(data):
    whole = original(".safetensors")
    end = 8 + int.from_bytes(whole[:8], "little")
    attempt(damaged(whole, data, 0, end), ".safetensors")


@QUICK
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"{", b"\0" * 8 + b"{"]),
)
def test_arbitrary_bytes(tail, head):
    assert not attempt(head + tail, ".pt")


def without_checksums(whole: bytes) -> bytes:
    """Returns the archive with every recorded checksum 0, as torch writes it without them."""
    out, at = bytearray(whole), 0
    while (at := whole.find(b"PK\x01\x02", at)) >= 0:
        out[at + 16 : at + 20] = bytes(4)
        at += 4
    return bytes(out)


class Attack:
    """Pickled by Python's own pickler: a call when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickles_do_not_run(tmp_path, protocol):
    marker, path = tmp_path / "ran", tmp_path / "model.pt"
    out = io.BytesIO()
    pickle.Pickler(out, protocol).dump({"a": Attack(marker)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", out.getvalue())
    with pytest.raises(
        UserError, match=r"builtins\.exec|__builtin__\.exec|no file of weights needs"
    ):
        read_model(path)
    assert not marker.exists()
