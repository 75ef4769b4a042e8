"""Networks of the Hugging Face hub by their id, from a server on the loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from convert_samples import dit_shapes, random_arrays
from hub_server import COMMIT, serving
from safetensors.numpy import save_file

import qdit_jax as qdit
from qdit_convert.hub import HubId, chosen_files, downloaded, is_hub_id, parse

pytest.importorskip("huggingface_hub")

PIPELINE = [
    *("README.md", "model_index.json", "scheduler/scheduler_config.json"),
    *("transformer/config.json", "transformer/diffusion_pytorch_model.bin"),
    *("transformer/diffusion_pytorch_model-00001-of-00002.safetensors",),
    *("transformer/diffusion_pytorch_model-00002-of-00002.safetensors",),
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    *("vae/config.json", "vae/diffusion_pytorch_model.fp16.bin"),
    *("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"),
]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:facebook/DiT-XL-2-256", ("facebook/DiT-XL-2-256", None, "")),
        ("hf:a/b@main", ("a/b", "main", "")),
        ("hf:a/b@v1/deep/file.pt", ("a/b", "v1", "deep/file.pt")),
        ("hf:a/b/folder/", ("a/b", None, "folder")),
    ],
)
def test_ids_are_read(text, parts):
    assert is_hub_id(text)
    assert parse(text) == HubId(*parts)


@pytest.mark.parametrize("text", ["hf:name", "hf:a/b@", "hf:a//b"])
def test_other_texts_are_refused(text):
    with pytest.raises(qdit.UserError, match="no id of the hub"):
        parse(text)
    assert not is_hub_id("hf://bucket/name")


def test_of_a_pipeline_only_what_is_read_is_chosen():
    found = chosen_files(PIPELINE, parse("hf:a/b"))
    assert sorted(found) == sorted(
        set(PIPELINE)
        - {"README.md", "transformer/diffusion_pytorch_model.bin"}
        - {"vae/diffusion_pytorch_model.fp16.bin", "text_encoder/model.safetensors"}
    )
    vae = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert sorted(chosen_files(PIPELINE, parse("hf:a/b/vae"))) == vae
    assert sorted(chosen_files(PIPELINE, parse(f"hf:a/b/{vae[1]}"))) == vae


def test_one_file_of_weights_is_taken_and_of_several_none():
    assert chosen_files(["a.pt", "b.txt"], parse("hf:a/b")) == ["a.pt"]
    with pytest.raises(
        qdit.UserError, match=r"several files of weights: a\.pt, c\.pt; write hf:a/b/FILE"
    ):
        chosen_files(["a.pt", "c.pt"], parse("hf:a/b"))
    with pytest.raises(qdit.UserError, match="no weights"):
        chosen_files(["b.txt"], parse("hf:a/b"))
    with pytest.raises(qdit.UserError, match=r"has no c; it has a\.pt"):
        chosen_files(["a.pt"], parse("hf:a/b/c"))


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "small"
    folder.mkdir()
    save_file(random_arrays(dit_shapes()), folder / "small.safetensors")
    (folder / "README.md").write_text("a small DiT")
    return {"someone/small": folder}


def converted(arguments, address, cache, **env):
    """Returns a run of `qdit convert` with the hub at another address."""
    variables = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "JAX_PLATFORMS": "cpu", **env}
    command = [sys.executable, "-m", "qdit_jax", "convert", *arguments]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        command, env=kept | variables, capture_output=True, text=True, check=False
    )


def test_a_network_is_downloaded_once_and_converted(repositories, tmp_path):
    with serving(repositories, token="secret") as (address, asked):
        options = ("--num-heads", "2", "--json")
        out = tmp_path / "out"
        done = converted(
            ("hf:someone/small", str(out), *options), address, tmp_path / "home", HF_TOKEN="secret"
        )
        assert done.returncode == 0, done.stderr
        metadata = json.loads(done.stdout)["metadata"]
        assert metadata["hub"] == f"someone/small@{COMMIT}"
        assert "GET small.safetensors" in asked
        assert not [name for name in asked if "README" in name]
        asked.clear()
        again = converted(
            (f"hf:someone/small@{COMMIT}/small.safetensors", str(tmp_path / "b"), *options),
            *(address, tmp_path / "home"),
            HF_TOKEN="secret",
        )
        assert again.returncode == 0, again.stderr
        assert "GET small.safetensors" not in asked  # it was kept
    kernel = qdit.load(out).params["blocks_0"]["attn"]["proj"]["kernel"]
    expected = random_arrays(dit_shapes())["blocks.0.attn.proj.weight"].T
    np.testing.assert_array_equal(kernel, expected)


def test_what_the_hub_refuses_is_one_sentence(repositories, tmp_path):
    with serving(repositories, token="secret") as (address, _):
        done = converted(("hf:someone/small", str(tmp_path / "out")), address, tmp_path / "home")
    assert done.returncode == 2
    assert "hf:someone/small: the hub answers 401" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(qdit.UserError, match=r"pip install 'qdit-jax\[hub\]'"):
        downloaded("hf:a/b")
