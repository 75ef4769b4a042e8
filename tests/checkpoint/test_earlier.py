"""Checkpoints that were written before kernels were stored K-major: every version loads, in every way."""

import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from qdit_jax.checkpoint import DeferredArray, earlier, load, materialized, open_checkpoint, save
from qdit_jax.cli import main
from qdit_jax.errors import UserError
from qdit_jax.quant import QTensor, dequantize, integer_codes, packing

GOLDENS = Path(__file__).parent.parent / "goldens/row_major"
# Version 1 holds W4, W3, W8, W5, W6, MXFP4, NVFP4, NF4, E2M1, scales of 16 bits, of several channels;
# version 2 two levels of scales, LUT4, W7, W2.
VERSIONS = (1, 2)


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def folder(version, tmp_path_factory):
    path = tmp_path_factory.mktemp("earlier") / "ckpt"
    with zipfile.ZipFile(GOLDENS / f"folder_{version}.zip") as archive:
        archive.extractall(path)
    return path


@pytest.fixture(scope="module")
def file(version):
    return GOLDENS / f"file_{version}.safetensors"


@pytest.fixture(scope="module")
def recorded(version):
    with np.load(GOLDENS / f"values_{version}.npz") as found:
        return dict(found)


def kernels(params):
    flat = flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if isinstance(leaf, QTensor)}


def check_kernels(params, recorded):
    found = kernels(params)
    names = {key.removeprefix("codes:") for key in recorded if key.startswith("codes:")}
    assert set(found) == names
    for path, q in found.items():
        np.testing.assert_array_equal(integer_codes(q), recorded[f"codes:{path}"], path)
        np.testing.assert_array_equal(dequantize(q), recorded[f"values:{path}"], path)


def test_folder_and_file_give_the_codes_values_and_output_of_their_day(folder, file, recorded):
    for path in (folder, file):
        checkpoint = load(path)
        check_kernels(checkpoint.params, recorded)
    inputs = (recorded[name] for name in ("x", "t", "y"))
    output = jax.jit(checkpoint.model.apply)({"params": checkpoint.params}, *inputs)
    # Float noise may carry an activation over a tie of its quantizer.
    most = np.abs(recorded["output"]).max()
    np.testing.assert_allclose(output, recorded["output"], rtol=0, atol=1e-3 * most)


def test_arrays_left_on_disk_are_converted_when_they_are_read(folder, recorded):
    checkpoint = open_checkpoint(folder)
    leaves = jax.tree.leaves(checkpoint.params)
    assert all(isinstance(leaf, DeferredArray) for leaf in leaves)
    read = materialized(checkpoint).params
    check_kernels(read, recorded)
    for deferred, leaf in zip(leaves, jax.tree.leaves(read), strict=True):
        assert (deferred.shape, deferred.dtype) == (leaf.shape, leaf.dtype)


def test_placed_arrays_are_converted_and_placed(folder, recorded):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoint = load(folder, sharding=place)
    assert all(leaf.sharding == place for leaf in jax.tree.leaves(checkpoint.params))
    check_kernels(checkpoint.params, recorded)


def test_what_is_written_again_is_of_the_newest_version(folder, version, recorded, tmp_path, capsys):
    assert json.loads((folder / "model.json").read_text())["format_version"] == version
    save(tmp_path / "lazy", open_checkpoint(folder))
    assert main(["export", str(folder), str(tmp_path / "x.safetensors")]) == 0
    for path in (tmp_path / "lazy", tmp_path / "x.safetensors"):
        check_kernels(load(path).params, recorded)
    assert json.loads((tmp_path / "lazy/model.json").read_text())["format_version"] == 3
    capsys.readouterr()
    texts = []
    for path in (folder, tmp_path / "lazy", tmp_path / "x.safetensors"):
        assert main(["inspect", str(path), "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert [text["parts"] for text in texts] == [texts[0]["parts"]] * 3
    assert [text["bytes"] for text in texts] == [texts[0]["bytes"]] * 3


def test_a_newer_version_is_refused_in_one_sentence(folder, tmp_path):
    save(tmp_path / "ckpt", open_checkpoint(folder))
    file = tmp_path / "ckpt/model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 4}))
    with pytest.raises(UserError, match="format version 4; this qdit_jax reads versions 1 to 3: install"):
        load(tmp_path / "ckpt")


@pytest.mark.parametrize("bits", range(2, 9))
def test_arrays_are_converted_in_blocks_of_channels(bits, monkeypatch):
    monkeypatch.setattr(earlier, "BLOCK", 1000)
    for count in (1, 33, 100, 256):
        codes = np.random.default_rng(bits).integers(0, 2**bits, (2, count, 7)).astype(np.uint8)
        stored = earlier_pack(codes, bits)
        found = earlier.Change(bits, count).apply(stored)
        np.testing.assert_array_equal(found, packing.pack(np.swapaxes(codes, -1, -2), bits))


def earlier_pack(codes, bits):
    """Returns codes `[..., K, N]` packed as before version 3, one code after the other."""
    *lead, count, width = codes.shape
    parts, shift = [], 0
    for plane in packing.planes(bits):
        fields, size = 8 // plane, packing.plane_bytes(count, plane)
        rows = np.zeros((*lead, size, width), np.uint8)
        block = 32 * fields
        for k in range(count):
            start = k // block * block
            length = 32 if count - start >= block else size - start // fields
            field, row = divmod(k - start, length)
            part = (codes[..., k, :] >> shift) & (2**plane - 1)
            rows[..., start // fields + row, :] |= part << (plane * field)
        parts.append(rows)
        shift += plane
    return np.concatenate(parts, axis=-2)
