"""Every bad file has its own sentence."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest
from convert_samples import write_raw_safetensors, write_safetensors

from qdit_convert.readers import open_weights
from qdit_jax.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700611775\n"
TWO = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html><body>404", "web page"),
        (b"\n <html>", "web page"),
        (LFS, r"Git LFS pointer; the real file of 2,700,611,775 bytes"),
        (b"PK\x03\x04" + b"\0" * 100, "ends early"),
        (pickle.dumps({"a": 1}), "bare Python pickle"),
        (b'{"error": "not found"}', "JSON file"),
        (b"\x1f\x8b\x08rest", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\0" * 257 + b"ustar", "tar archive"),
        (b"random bytes that mean nothing", "neither a torch file"),
        (b"\x80", "neither a torch file"),
    ],
)
def test_other_kinds_of_file(tmp_path, data, message):
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        open_weights(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_zip_files_that_are_no_torch_files(tmp_path, pt):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(UserError, match=r"no data\.pkl"):
        open_weights(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/constants.pkl", b"")
    with pytest.raises(UserError, match="TorchScript"):
        open_weights(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"x" * 1000)
    with pytest.raises(UserError, match="compressed"):
        open_weights(path)


def test_every_truncation_of_a_torch_file_is_a_sentence(pt, dit):
    path = pt(dit)
    data = path.read_bytes()
    for length in (len(data) - 1, len(data) - 30, len(data) // 2, 100):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"ends early|damaged"):
            open_weights(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "not valid JSON"),
        (b"[1]", b"", "not a JSON object"),
        (b"[" * 100_000, b"", "not valid JSON"),
        ({"a": 3}, b"", "'a' is malformed"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "'a' is malformed"),
        ({"a": {**TWO["a"], "dtype": "F7"}}, b"\0" * 8, "'F7', which convert does not know"),
        ({"a": {**TWO["a"], "shape": [-2]}}, b"\0" * 8, "impossible size"),
        ({"a": {**TWO["a"], "shape": [1.5]}}, b"\0" * 8, "impossible size"),
        ({"a": {**TWO["a"], "shape": [3]}}, b"\0" * 8, "needs 12 bytes, but its offsets span 8"),
        ({**TWO, "b": TWO["a"]}, b"\0" * 8, "'a' and 'b' overlap"),
        ({**TWO, "b": {**TWO["b"], "data_offsets": [12, 20]}}, b"\0" * 20, "belong to no tensor"),
        (TWO, b"\0" * 15, "promises 16 bytes of values, there are 15"),
        (TWO, b"\0" * 20, "4 bytes at the end belong to no tensor"),
        ({"__metadata__": {}}, b"", "empty state dict"),
    ],
)
def test_safetensors_headers_are_checked(tmp_path, header, data, message):
    path = write_raw_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(UserError, match=message):
        open_weights(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc", "too few"),
        (b"\xff" * 8 + b"{}", "absurd"),
        ((1000).to_bytes(8, "little") + b"{}", "ends early"),
    ],
)
def test_safetensors_lengths_are_checked(tmp_path, data, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        open_weights(path)


@pytest.fixture
def shards(tmp_path):
    """Returns a folder of two shards and its index, `{name: file}`."""
    arrays = {name: np.full(2, i, np.float32) for i, name in enumerate("abc")}
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    write_safetensors(tmp_path / files[0], {k: arrays[k] for k in "ab"})
    write_safetensors(tmp_path / files[1], {"c": arrays["c"]})
    places = {"a": files[0], "b": files[0], "c": files[1]}

    def index(**changes):
        content = {"weight_map": {k: v for k, v in {**places, **changes}.items() if v}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        return tmp_path

    return index


def test_shards_are_one_table(shards):
    found = open_weights(shards()).tensors
    assert {k: t.read()[0] for k, t in found.items()} == {"a": 0, "b": 1, "c": 2}
    assert set(open_weights(shards() / "model.safetensors.index.json").tensors) == set("abc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": "model-00003-of-00003.safetensors"}, "1 of its 2 shards are missing: model-00003"),
        ({"c": "../secret.safetensors"}, "'../secret.safetensors', which leaves the folder"),
        ({"c": "/etc/passwd"}, "leaves the folder"),
        ({"d": "model-00002-of-00002.safetensors"}, "lacks 1 tensors .*: d"),
        ({"c": "model-00001-of-00002.safetensors"}, "lacks 1 tensors .*: c"),
        ({"b": None}, "does not put there: b"),
        ({"c": 3}, "a file name for every tensor"),
    ],
)
def test_indices_are_checked(shards, changes, message):
    with pytest.raises(UserError, match=message):
        open_weights(shards(**changes))


def test_shards_without_an_index(shards, tmp_path):
    shards()
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"no index\.json"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="one shard of several"):
        open_weights(tmp_path / "model-00001-of-00002.safetensors")


def test_an_empty_index_is_refused(shards, tmp_path):
    for text, message in (
        ("{}", "no weight_map"),
        ("[]", "not weights|no weight_map|neither"),
        ("{", "JSON"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=message):
            open_weights(tmp_path / "model.safetensors.index.json")


def test_folders_without_weights(tmp_path):
    with pytest.raises(UserError, match="holds no weights"):
        open_weights(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"several files of weights \(a\.pt, b\.pt\)"):
        open_weights(tmp_path)


def test_full_precision_is_preferred_to_fp16(tmp_path):
    name = "diffusion_pytorch_model"
    write_safetensors(tmp_path / f"{name}.fp16.safetensors", {"a": np.ones(1, np.float16)})
    assert open_weights(tmp_path).tensors["a"].dtype == np.float16
    write_safetensors(tmp_path / f"{name}.safetensors", {"a": np.ones(1, np.float32)})
    assert open_weights(tmp_path).tensors["a"].dtype == np.float32
