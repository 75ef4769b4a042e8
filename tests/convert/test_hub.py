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
from qdit_convert import convert
from qdit_convert.hub import chosen_files
from qdit_jax.cli import main
from qdit_jax.files import HubId, downloaded, hub_id, is_hub_id

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
    assert hub_id(text) == HubId(*parts)


@pytest.mark.parametrize("text", ["hf:name", "hf:a/b@", "hf:a//b"])
def test_other_texts_are_refused(text):
    with pytest.raises(qdit.UserError, match="no id of the hub"):
        hub_id(text)
    assert not is_hub_id("hf://bucket/name")


def test_of_a_pipeline_only_what_is_read_is_chosen():
    found = chosen_files(PIPELINE, hub_id("hf:a/b"))
    assert sorted(found) == sorted(
        set(PIPELINE)
        - {"README.md", "transformer/diffusion_pytorch_model.bin"}
        - {"vae/diffusion_pytorch_model.fp16.bin", "text_encoder/model.safetensors"}
    )
    vae = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert sorted(chosen_files(PIPELINE, hub_id("hf:a/b/vae"))) == vae
    assert sorted(chosen_files(PIPELINE, hub_id(f"hf:a/b/{vae[1]}"))) == vae


def test_one_file_of_weights_is_taken_and_of_several_none():
    assert chosen_files(["a.pt", "b.txt"], hub_id("hf:a/b")) == ["a.pt"]
    with pytest.raises(
        qdit.UserError, match=r"several files of weights: a\.pt, c\.pt; write hf:a/b/FILE"
    ):
        chosen_files(["a.pt", "c.pt"], hub_id("hf:a/b"))
    with pytest.raises(qdit.UserError, match="no weights"):
        chosen_files(["b.txt"], hub_id("hf:a/b"))
    with pytest.raises(qdit.UserError, match=r"has no c; it has a\.pt"):
        chosen_files(["a.pt"], hub_id("hf:a/b/c"))


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "small"
    folder.mkdir()
    save_file(random_arrays(dit_shapes()), folder / "small.safetensors")
    (folder / "README.md").write_text("a small DiT")
    return {"someone/small": folder}


def run(arguments, address, cache, code=None, **env):
    """Returns a run of `qdit` with the hub at another address."""
    variables = {"HF_ENDPOINT": address, "HF_HOME": str(cache), "JAX_PLATFORMS": "cpu", **env}
    program = ("-m", "qdit_jax") if code is None else ("-c", code)
    command = [sys.executable, *program, *arguments]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        command, env=kept | variables, capture_output=True, text=True, check=False
    )


def test_a_network_is_downloaded_once_and_converted(repositories, tmp_path):
    with serving(repositories, token="secret") as (address, asked):
        options = ("--num-heads", "2", "--json")
        out = tmp_path / "out"
        done = run(
            ("convert", "hf:someone/small", str(out), *options),
            address,
            tmp_path / "home",
            HF_TOKEN="secret",
        )
        assert done.returncode == 0, done.stderr
        metadata = json.loads(done.stdout)["metadata"]
        assert metadata["hub"] == f"someone/small@{COMMIT}"
        assert "GET small.safetensors" in asked
        assert not [name for name in asked if "README" in name]
        asked.clear()
        again = run(
            (
                "convert",
                f"hf:someone/small@{COMMIT}/small.safetensors",
                str(tmp_path / "b"),
                *options,
            ),
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
        done = run(
            ("convert", "hf:someone/small", str(tmp_path / "out")), address, tmp_path / "home"
        )
    assert done.returncode == 2
    assert "hf:someone/small: the hub answers 401" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(qdit.UserError, match=r"pip install 'qdit-jax\[hub\]'"):
        downloaded("hf:a/b", chosen_files)


LOADED = """
import sys
import qdit_jax as qdit
checkpoint = qdit.load("hf:someone/packed")
print(checkpoint.recipe.name, type(checkpoint.params["blocks_0"]["mlp"]["fc1"]["kernel"]).__name__)
"""


def test_a_checkpoint_is_pushed_with_its_card_and_loaded(repositories, tmp_path):
    checkpoint = convert(repositories["someone/small"] / "small.safetensors", num_heads=2)
    recipe = qdit.Recipe.preset("w4a8", checkpoint, group_size=8)
    qdit.quantize(checkpoint, "rtn", recipe, out=tmp_path / "packed.safetensors")
    interval = {"estimate": 20.5, "low": 19.0, "high": 22.0}
    measured = {"paired": {"w4a8": {"latent_snr_db": interval}}, "settings": {"num_samples": 10}}
    (tmp_path / "metrics.json").write_text(json.dumps(measured))
    options = ("--license", "apache-2.0", "--measured", str(tmp_path / "metrics.json"))
    with serving({}, token="secret", store=tmp_path / "store") as (address, _):
        hub = (address, tmp_path / "home")
        done = run(
            ("push", str(tmp_path / "packed.safetensors"), "hf:someone/packed", *options),
            *hub,
            HF_TOKEN="secret",
        )
        assert done.returncode == 0, done.stderr
        loaded = run((), *hub, code=LOADED, HF_TOKEN="secret")
        assert loaded.stdout.split() == ["w4a8-g8", "QTensor"], loaded.stderr
    card = (tmp_path / "store/someone/packed/README.md").read_text()
    assert card.startswith("---\nlibrary_name: qdit_jax\n")
    assert "license: apache-2.0" in card
    assert "| 4 bits, groups of 8 | 8 |" in card
    assert "final latents: signal to error, dB | 20.5 (19 to 22) |" in card
    assert 'qdit.load("hf:someone/packed/model.safetensors")' in card
    assert "by method `rtn`, recipe `w4a8-g8`" in card


def test_a_dry_run_uploads_nothing_and_bad_options_are_named(repositories, tmp_path, capsys):
    checkpoint = convert(repositories["someone/small"] / "small.safetensors", num_heads=2)
    qdit.save(tmp_path / "full", checkpoint)
    push = ["push", str(tmp_path / "full"), "hf:a/b"]
    assert main([*push, "--dry-run", str(tmp_path / "dry")]) == 0
    assert sorted(p.name for p in (tmp_path / "dry").iterdir()) == [
        "README.md",
        "model.safetensors",
    ]
    assert "has not been measured" in (tmp_path / "dry/README.md").read_text()
    assert main([*push, "--dry-run", str(tmp_path / "dry")]) == 2
    assert "--dry-run" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main([*push, "--measured", str(tmp_path / "other.json")]) == 2
    assert "holds no paired measures" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "full"), "a/b"]) == 2
    assert "a/b is no id of the hub" in capsys.readouterr().err
