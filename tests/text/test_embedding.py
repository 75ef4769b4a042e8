"""Prompts are embedded as the published pipelines do; tiny random encoders stand for theirs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toy_family import ROW, ToyVideo

import qdit_jax as qdit
from qdit_jax.cli import main
from qdit_jax.models import FAMILIES
from qdit_jax.text import embed_prompts

pytest.importorskip("torch")
pytest.importorskip("transformers")
from tiny_encoders import save_pipeline

PROMPTS = ("a red fox runs over the hill", "Two  dogs &amp; a fox", "blue")
KINDS = {
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "StableDiffusion3Pipeline": 77 + 256,
    "FluxPipeline": 512,
    "WanPipeline": 512,
    "Flux2KleinPipeline": 512,
    "ZImagePipeline": 512,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipelines")
    return {kind: save_pipeline(base / kind, kind) for kind in KINDS}


def published(kind, folder):
    """Returns what diffusers' own pipeline makes of the prompts."""
    diffusers = pytest.importorskip("diffusers")
    import inspect

    import torch
    import transformers

    cls = getattr(diffusers, kind)
    parts = dict.fromkeys(inspect.signature(cls.__init__).parameters)
    del parts["self"]
    parts = {name: None for name in parts if not name.startswith(("boundary", "expand", "is_"))}
    index = {"PixArt": "T5EncoderModel", "Wan": "UMT5EncoderModel"}
    index |= {"Flux2": "Qwen3ForCausalLM", "ZImage": "Qwen3Model"}
    for path in folder.iterdir():
        if path.name.startswith("tokenizer"):
            parts[path.name] = transformers.AutoTokenizer.from_pretrained(path)
        if path.name.startswith("text_encoder"):
            last = path.name == (
                "text_encoder_3" if kind.startswith("Stable") else "text_encoder_2"
            )
            clip = "CLIPTextModelWithProjection" if kind.startswith("Stable") else "CLIPTextModel"
            name = next((n for k, n in index.items() if kind.startswith(k)), None)
            name = name or ("T5EncoderModel" if last and "_" in path.name[5:] else clip)
            if kind.startswith("Stable") and path.name == "text_encoder_2":
                name = clip
            parts[path.name] = getattr(transformers, name).from_pretrained(path)
    pipe = cls(**parts)
    options = {"prompt": list(PROMPTS), "device": torch.device("cpu")}
    if kind.startswith("PixArt"):
        found = pipe.encode_prompt(**options, do_classifier_free_guidance=True, clean_caption=False)
        names = ("text", "text_mask", "null_text", "null_text_mask")
    elif kind.startswith("Stable"):
        found = pipe.encode_prompt(**options, prompt_2=None, prompt_3=None)
        names = ("text", "null_text", "pooled", "null_pooled")
    elif kind.startswith("Flux2"):
        found = pipe.encode_prompt(**options)[:1]
        names = ("text",)
    elif kind.startswith("ZImage"):
        texts, nulls = pipe.encode_prompt(**options)
        found = [padded(texts), padded(nulls)]
        found = [found[0][0], found[0][1], found[1][0], found[1][1]]
        names = ("text", "text_mask", "null_text", "null_text_mask")
    elif kind.startswith("Flux"):
        found = pipe.encode_prompt(**options, prompt_2=None)[:2]
        names = ("text", "pooled")
    else:
        found = pipe.encode_prompt(**options, max_sequence_length=512)
        names = ("text", "null_text")
    return {name: a.detach().numpy() for name, a in zip(names, found, strict=True)}


def padded(texts):
    """Returns lists of rows as one array with a mask, as our conditions are."""
    import torch

    rows = KINDS["ZImagePipeline"]
    whole = torch.zeros(len(texts), rows, texts[0].shape[-1])
    for i, text in enumerate(texts):
        whole[i, : len(text)] = text.detach()
    return whole, torch.arange(rows) < torch.tensor([[len(text)] for text in texts])


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_the_published_pipeline(folders, kind):
    null = None if kind.startswith("Flux") else ""
    found = embed_prompts(folders[kind], PROMPTS, null=null, batch_size=2).condition
    assert found["text"].shape[:2] == (3, KINDS[kind])
    expected = published(kind, folders[kind])
    assert set(found) == set(expected)
    if kind.startswith("ZImage"):  # whose pipeline leaves out what the mask leaves out
        for name in ("text", "null_text"):
            found[name] = found[name] * found[f"{name}_mask"][..., None]
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array[: len(found[name])], atol=1e-5, err_msg=name)


def test_sd3_without_t5_has_zeros_there(folders, tmp_path):
    import shutil

    folder = tmp_path / "sd3"
    shutil.copytree(folders["StableDiffusion3Pipeline"], folder)
    shutil.rmtree(folder / "text_encoder_3")
    found = embed_prompts(folder, PROMPTS)
    whole = embed_prompts(folders["StableDiffusion3Pipeline"], PROMPTS)
    assert "no text_encoder_3: its tokens are zeros" in " ".join(found.notes)
    np.testing.assert_array_equal(found.condition["text"][:, :77], whole.condition["text"][:, :77])
    assert not found.condition["text"][:, 77:].any()
    assert whole.condition["text"][:, 77:].any()


def test_flux_without_guidance_takes_256_tokens(folders, tmp_path):
    import shutil

    folder = tmp_path / "schnell"
    shutil.copytree(folders["FluxPipeline"], folder)
    (folder / "transformer/config.json").write_text(json.dumps({"guidance_embeds": False}))
    assert embed_prompts(folder, ["blue"]).condition["text"].shape[1] == 256


def test_a_prompt_that_is_cut_is_told(folders):
    found = embed_prompts(folders["PixArtAlphaPipeline"], PROMPTS, max_length=4)
    assert "prompt 0 ('a red fox runs over the hill') is cut from 8 tokens to 4" in " ".join(
        found.notes
    )
    assert found.condition["text"].shape[1] == 4


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Returns the folder of a checkpoint that takes what the tiny PixArt encoder makes."""
    from tiny_models import random_params

    monkeypatch.setitem(FAMILIES, ROW.name, ROW)
    model = ToyVideo(depth=1, text_length=120, text_width=12)
    qdit.save(tmp_path / "toy", qdit.Checkpoint(model, random_params(model)))
    return tmp_path / "toy"


def test_the_command_writes_what_every_verb_takes(folders, tmp_path, toy, capsys):
    texts, out = tmp_path / "prompts.txt", tmp_path / "p.npz"
    texts.write_text("\n".join(PROMPTS) + "\n")
    folder = str(folders["PixArtAlphaPipeline"])
    given = ["embed-text", folder, "--prompts", str(texts), "--out", str(out), "--null", ""]
    assert main(given) == 0
    assert "3 prompts as pixart-alpha embeds them" in capsys.readouterr().out
    found = qdit.read_conditions(out, qdit.load(toy).model)
    assert found.prompts == PROMPTS
    assert found.condition["null_text"].shape == (1, 120, 12)
    assert main(given) == 2
    assert "exists already" in capsys.readouterr().err
    steps = ["--steps", "2", "--out"]
    kept, direct = tmp_path / "kept.npz", tmp_path / "direct.npz"
    assert main(["sample", str(toy), "--embeds", str(out), *steps, str(kept)]) == 0
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    encoders = ["--text-encoders", folder]
    assert main(["sample", str(toy), *prompts, *encoders, *steps, str(direct)]) == 0
    a, b = (np.load(path) for path in (kept, direct))
    np.testing.assert_allclose(a["latents"], b["latents"], atol=1e-5)
    assert b["prompts"].tolist() == list(PROMPTS)


def test_what_does_not_fit_is_refused(folders, tmp_path, toy, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(qdit.UserError, match="that names a pipeline; say which"):
        embed_prompts(tmp_path / "empty", ["a"])
    with pytest.raises(qdit.UserError, match="empty/tokenizer is no folder"):
        embed_prompts(tmp_path / "empty", ["a"], pipeline="open-sora")
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(
        qdit.UserError, match="is a OtherPipeline, whose text encoders are not known"
    ):
        embed_prompts(tmp_path / "empty", ["a"])
    assert main(["sample", str(toy), "--prompt", "a", "--out", str(tmp_path / "a.npz")]) == 2
    assert "--prompt needs --text-encoders DIR" in capsys.readouterr().err
    wide = str(folders["StableDiffusion3Pipeline"])
    given = ["--prompt", "a", "--text-encoders", wide, "--out", str(tmp_path / "a.npz")]
    assert main(["sample", str(toy), *given]) == 2
    assert "text is 20 wide and the network takes 12" in capsys.readouterr().err
