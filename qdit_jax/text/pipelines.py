"""The table of pipelines: which encoders a published pipeline has, and how it joins their outputs.

Dimensions: N prompts, L tokens.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qdit_jax.errors import UserError
from qdit_jax.files import PathLike, as_path
from qdit_jax.text.encoders import CLIP_LENGTH, Encoded, TextEncoder

# What the encoders made by the names of their folders, the tokens of the text, and the pipeline's
# folder, to a condition.
JoinFn = Callable[[Mapping[str, Encoded], int, Path], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a family's published pipeline embeds a prompt.

    Attributes:
        classes: pattern of pipelines' class names in `model_index.json`.
        encoders: in their order.
        length: tokens of the text, by default.
        join: of the encoders' outputs.
        clean: of a prompt, before it is split into tokens.
        optional: folders of encoders that a pipeline may lack.
        notes: what differs from the pipeline, for whoever embeds.
    """

    classes: str
    encoders: tuple[TextEncoder, ...]
    length: int
    join: JoinFn
    clean: Callable[[str], str] = str
    optional: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def lowered(prompt: str) -> str:
    """Returns a prompt as PixArt's and Latte's pipelines take it where they do not clean it of HTML."""
    return prompt.lower().strip()


def tidied(prompt: str) -> str:
    """Returns a prompt as Wan's pipelines take it where ftfy is not installed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def masked(found: Mapping[str, Encoded], length: int, folder: Path) -> dict[str, np.ndarray]:
    """Returns the tokens of one encoder with their mask."""
    (one,) = found.values()
    return {"text": one.text, "text_mask": one.mask}


def unmasked(found: Mapping[str, Encoded], length: int, folder: Path) -> dict[str, np.ndarray]:
    """Returns the tokens of one encoder, padding included: the network attends to all."""
    (one,) = found.values()
    return {"text": one.text}


def zero_padded(found: Mapping[str, Encoded], length: int, folder: Path) -> dict[str, np.ndarray]:
    """Returns the tokens of one encoder, zero beyond the prompt's end: no mask follows."""
    (one,) = found.values()
    return {"text": one.text * one.mask[..., None].astype(np.float32)}


def clips_then_t5(found: Mapping[str, Encoded], length: int, folder: Path) -> dict[str, np.ndarray]:
    """Returns SD3's text: both CLIPs side by side, zero-padded in width, then T5; and both pooled.

    Without T5 its tokens are zeros, as in the published pipeline.
    """
    large, giant, t5 = (found.get(name) for name in ("text_encoder", *SD3_OTHERS))
    assert large is not None  # only T5 is optional
    assert giant is not None
    clips = np.concatenate([large.text, giant.text], axis=-1)
    if t5 is None:
        width = int(config_of(folder / "transformer")["joint_attention_dim"])
        last = np.zeros((len(clips), length, width), np.float32)
    else:
        last = t5.text
    wide = np.pad(clips, ((0, 0), (0, 0), (0, last.shape[-1] - clips.shape[-1])))
    pooled = np.concatenate([large.pooled, giant.pooled], axis=-1)
    return {"text": np.concatenate([wide, last], axis=1), "pooled": pooled}


def t5_and_pooled(found: Mapping[str, Encoded], length: int, folder: Path) -> dict[str, np.ndarray]:
    """Returns FLUX's text: T5's tokens, padding included, and CLIP's pooled vector."""
    return {"text": found["text_encoder_2"].text, "pooled": found["text_encoder"].pooled}


def config_of(folder: Path) -> dict[str, Any]:
    """Returns the `config.json` in a folder; raises `UserError` if there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return found
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}).") from error


SD3_OTHERS = ("text_encoder_2", "text_encoder_3")
QWEN = TextEncoder("tokenizer", "text_encoder", "Qwen3Model", takes_mask=True, chat=False)
T5 = TextEncoder("tokenizer", "text_encoder", "T5EncoderModel", takes_mask=True)
LOWERED = (
    "prompts are lowercased and stripped; they are not cleaned of HTML and links, as the pipeline does "
    "where ftfy and bs4 are installed"
)
PIPELINES = {
    "pixart-alpha": Pipeline(
        "PixArtAlphaPipeline", (T5,), 120, masked, lowered, notes=(LOWERED,)
    ),
    "pixart-sigma": Pipeline(
        "PixArtSigmaPipeline", (T5,), 300, masked, lowered, notes=(LOWERED,)
    ),
    "latte": Pipeline("LattePipeline", (T5,), 120, masked, lowered, notes=(LOWERED,)),
    "open-sora": Pipeline("(?!)", (T5,), 300, masked, lowered, notes=(LOWERED,)),
    "sd3": Pipeline(
        "StableDiffusion3.*Pipeline",
        (
            TextEncoder(
                *("tokenizer", "text_encoder", "CLIPTextModelWithProjection"),
                pooled="text_embeds",
                layers=(-2,),
                length=CLIP_LENGTH,
            ),
            TextEncoder(
                *("tokenizer_2", "text_encoder_2", "CLIPTextModelWithProjection"),
                pooled="text_embeds",
                layers=(-2,),
                length=CLIP_LENGTH,
            ),
            TextEncoder("tokenizer_3", "text_encoder_3", "T5EncoderModel"),
        ),
        256,
        clips_then_t5,
        optional=("text_encoder_3",),
    ),
    "flux": Pipeline(
        "Flux(?!2).*Pipeline",
        (
            TextEncoder(
                *("tokenizer", "text_encoder", "CLIPTextModel"),
                pooled="pooler_output",
                length=CLIP_LENGTH,
            ),
            TextEncoder("tokenizer_2", "text_encoder_2", "T5EncoderModel"),
        ),
        512,
        t5_and_pooled,
    ),
    "flux2-klein": Pipeline(
        "Flux2Klein.*Pipeline", (dataclasses.replace(QWEN, layers=(9, 18, 27)),), 512, unmasked
    ),
    "z-image": Pipeline(
        "ZImage(?!Omni).*Pipeline",
        (dataclasses.replace(QWEN, layers=(-2,), chat=True),),
        512,
        masked,
    ),
    "wan": Pipeline(
        "Wan.*Pipeline",
        (TextEncoder("tokenizer", "text_encoder", "UMT5EncoderModel", takes_mask=True),),
        512,
        zero_padded,
        tidied,
        notes=("broken Unicode in prompts is not repaired, as the pipeline would with ftfy",),
    ),
}  # fmt: skip


def pipeline_of(folder: PathLike, name: str | None = None) -> tuple[str, Pipeline]:
    """Returns the row of a pipeline's folder and its name, by `model_index.json` or as `name` says.

    Raises:
        UserError: if the folder is absent or remote, or its pipeline is not known.
    """
    path = as_path(folder)
    if not isinstance(path, Path) or not path.is_dir():
        raise UserError(f"{folder} is no folder on this machine; give a diffusers pipeline's.")
    if name is not None:
        return name, PIPELINES[name]
    try:
        kind = str(json.loads((path / "model_index.json").read_text())["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} has no model_index.json that names a pipeline; say which it is: --pipeline "
            f"{' | '.join(PIPELINES)}."
        ) from None
    for row, pipeline in PIPELINES.items():
        if re.fullmatch(pipeline.classes, kind):
            return row, pipeline
    raise UserError(
        f"{folder} is a {kind}, whose text encoders are not known; say which of these embeds alike: "
        f"--pipeline {' | '.join(PIPELINES)}."
    )


def default_length(folder: Path, name: str, pipeline: Pipeline) -> int:
    """Returns the tokens of the text: the pipeline's, but 256 of a distilled FLUX (schnell)."""
    if name != "flux" or not (folder / "transformer" / "config.json").exists():
        return pipeline.length
    guided = config_of(folder / "transformer").get("guidance_embeds", False)
    return pipeline.length if guided else 256


def read_prompts(path: PathLike) -> list[str]:
    """Returns the prompts in a text file, one per line.

    Raises:
        UserError: if it cannot be read, is empty, or a line is blank.
    """
    try:
        lines = as_path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}).") from error
    if not lines:
        raise UserError(f"{path} holds no prompt; write one per line.")
    for i, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{path}: line {i} is blank; remove it (an empty prompt is --null '').")
    return lines
