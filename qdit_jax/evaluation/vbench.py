"""Clips as VBench reads them (arXiv:2311.17982): names, prompts, and a check of the folder.

VBench is a program of its own (`pip install vbench`) with weights of its own; nothing of it is here. In
its standard mode it looks for `{prompt}-{index}.mp4`, five per prompt of its list, and takes the suffix
of the first file in the folder for all: nothing else may lie there. With custom input it reads any clips,
and a JSON of file name to prompt, and measures only what needs no prompt of its own list.

Dimensions: N clips, T frames, H and W rows and columns, C channels.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, PathLike, as_path, replaced_file
from qdit_jax.metrics import image_batches, image_shape
from qdit_jax.report import FPS, check_clip, film_facts, save_film

# Dimension -> whether it is measured on custom input as well.
DIMENSIONS = {
    "subject_consistency": True,
    "background_consistency": True,
    "temporal_flickering": False,
    "motion_smoothness": True,
    "dynamic_degree": True,
    "aesthetic_quality": True,
    "imaging_quality": True,
    "object_class": False,
    "multiple_objects": False,
    "human_action": False,
    "color": False,
    "spatial_relationship": False,
    "scene": False,
    "temporal_style": False,
    "appearance_style": False,
    "overall_consistency": False,
}
CLIPS_PER_PROMPT, FLICKERING_CLIPS = (
    5,
    25,
)  # VBench drops clips that move before it measures flicker
CLIPS, PROMPTS, MANIFEST = "videos", "prompts.json", "vbench.json"
INFO = "VBench_full_info.json"
LONGEST_NAME = 240  # bytes of a file's name, with room for a temporary ending


@dataclasses.dataclass(frozen=True)
class VBenchPrompt:
    """A prompt of VBench's list, and the dimensions that are measured on its clips."""

    text: str
    dimensions: tuple[str, ...]

    def count(self, dimensions: Sequence[str]) -> int:
        """Returns how many clips of it the dimensions need; 0 if none does."""
        wanted = set(self.dimensions) & set(dimensions)
        if "temporal_flickering" in wanted:
            return FLICKERING_CLIPS
        return CLIPS_PER_PROMPT if wanted else 0


def read_prompts(path: PathLike | None = None) -> list[VBenchPrompt]:
    """Returns VBench's prompts, from its `VBench_full_info.json`.

    Without a path, that of the installed package.

    Raises:
        UserError: if there is none, or it is something else.
    """
    path = installed_info() if path is None else as_path(path)
    try:
        entries = json.loads(path.read_text())
        found = [VBenchPrompt(e["prompt_en"], tuple(e["dimension"])) for e in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not VBench's list of prompts ({INFO}): {error}.") from None
    strange = {name for prompt in found for name in prompt.dimensions} - set(DIMENSIONS)
    if not found or strange:
        raise UserError(f"{path} has dimensions that are not known: {sorted(strange)}.")
    return found


def installed_info() -> AnyPath:
    """Returns the list of prompts that lies in the installed package `vbench`."""
    spec = find_spec("vbench")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        if (file := Path(folder) / INFO).is_file():
            return file
    raise UserError(
        f"VBench's list of prompts is not here; give {INFO} (from the package vbench, or its repository)."
    )


def check_dimensions(dimensions: Sequence[str], custom: bool = False) -> None:
    """Raises `UserError` for a dimension that is not known, or not measured on custom input."""
    for name in dimensions:
        if name not in DIMENSIONS:
            raise UserError(f"dimension {name} is not known; use {', '.join(DIMENSIONS)}.")
        if custom and not DIMENSIONS[name]:
            allowed = [other for other, is_free in DIMENSIONS.items() if is_free]
            raise UserError(
                f"{name} is measured on VBench's own prompts only; on custom input use "
                f"{', '.join(allowed)}."
            )


def standard_names(prompts: Sequence[VBenchPrompt], dimensions: Sequence[str]) -> dict[str, str]:
    """Returns file name -> prompt of all clips that the dimensions need.

    Raises:
        UserError: if a prompt can be no file's name.
    """
    found = {}
    for prompt in prompts:
        for index in range(prompt.count(dimensions)):
            name = f"{prompt.text}-{index}.mp4"
            if "/" in name or len(name.encode()) > LONGEST_NAME:
                raise UserError(f"the prompt {prompt.text[:60]!r} can be no file's name.")
            found[name] = prompt.text
    return found


def named_clips(texts: Sequence[str], wanted: Mapping[str, str] | None) -> list[str]:
    """Returns the file name of each clip, from its prompt: the next one that is wanted.

    Without wanted names, numbers.

    Raises:
        UserError: if a prompt is not wanted, has too many clips, or too few.
    """
    if wanted is None:
        return [f"{i:05d}.mp4" for i in range(len(texts))]
    needed, done = Counter(wanted.values()), Counter[str]()
    names = []
    for text in texts:
        if text not in needed:
            raise UserError(
                f"the prompt {text[:60]!r} is not one of those that the dimensions measure; choose other "
                "dimensions, or custom input."
            )
        names.append(f"{text}-{done[text]}.mp4")
        done[text] += 1
    short = [text for text, count in needed.items() if done[text] < count]
    more = [text for text, count in needed.items() if done[text] > count]
    for wrong, what in ((more, "more"), (short, "fewer")):
        if wrong:
            raise UserError(
                f"{len(wrong)} prompts have {what} clips than VBench takes, such as {wrong[0][:60]!r}: "
                f"{done[wrong[0]]} of {needed[wrong[0]]}; sample {len(wanted):,} clips, prompt by prompt."
            )
    return names


def export_vbench(
    samples: PathLike,
    out: PathLike,
    *,
    prompts: Sequence[VBenchPrompt] | None = None,
    dimensions: Sequence[str] = tuple(DIMENSIONS),
    texts: Sequence[str] | None = None,
    fps: float | int = FPS,
    progress_fn: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Writes a folder for `vbench evaluate`, and returns what its `vbench.json` says of it.

    `OUT/videos` holds the clips, `OUT/prompts.json` their prompts (for custom input).

    Args:
        samples: an `.npz` of clips, uint8 `[N, T, H, W, C]` in `arr_0`, as `qdit sample` writes it.
        prompts: VBench's list: the standard mode, in which every clip that `dimensions` need must be
            there; None is custom input.
        texts: the prompt of each clip; by default those in the file.
        fps: frames per second of the clips.

    Raises:
        UserError: if the clips are none, have no prompts, or are not those that are needed.
    """
    samples, out = as_path(samples), as_path(out)
    check_dimensions(dimensions, custom=prompts is None)
    shape = image_shape(samples)
    if len(shape) != 5:
        raise UserError(f"{samples} holds images; VBench measures videos [N, T, H, W, C].")
    check_clip(out / "clip.mp4")
    texts = prompts_of(samples, shape[0]) if texts is None else list(texts)
    wanted = None if prompts is None else standard_names(prompts, dimensions)
    names = named_clips(texts, wanted)
    (out / CLIPS).mkdir(parents=True, exist_ok=True)
    for name, clip in zip(names, clips_in(samples), strict=True):
        save_film(out / CLIPS / name, clip, fps)
        progress_fn(1)
    manifest = {
        "vbench": "custom_input" if wanted is None else "vbench_standard",
        "dimensions": list(dimensions),
        "clips": dict(zip(names, texts, strict=True)),
        "fps": float(fps),
        "frames": shape[1],
        "size": [shape[2] - shape[2] % 2, shape[3] - shape[3] % 2],
    }
    (out / PROMPTS).write_text(json.dumps(manifest["clips"], indent=1, ensure_ascii=False))
    with replaced_file(out / MANIFEST) as file:
        file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
    return manifest


def clips_in(samples: AnyPath) -> Iterator[UInt8[np.ndarray, "T H W C"]]:
    """Yields the clips of a file one by one."""
    for batch in image_batches(samples, 1):
        yield batch[0]


def prompts_of(samples: AnyPath, count: int) -> list[str]:
    """Returns the prompts that lie beside the clips in a file."""
    if samples.is_dir():
        raise UserError(f"{samples} is a folder; give the .npz that `qdit sample` wrote.")
    with samples.open("rb") as file, np.load(file, allow_pickle=False) as data:
        found = [str(text) for text in data["prompts"]] if "prompts" in data.files else []
    if len(found) != count:
        raise UserError(
            f"{samples} has {count} clips and {len(found)} prompts; sample with --embeds or --prompt, "
            "which keep the prompts beside the clips, or give their texts."
        )
    return found


def commands(out: PathLike, manifest: Mapping[str, Any]) -> list[str]:
    """Returns the commands that measure a folder, one per dimension as VBench's own examples do."""
    out, mode = as_path(out), manifest["vbench"]
    more = f" --mode custom_input --prompt_file {out / PROMPTS}" if mode == "custom_input" else ""
    return [
        f"vbench evaluate --videos_path {out / CLIPS} --dimension {name}{more}"
        for name in manifest["dimensions"]
    ]


def check_vbench(out: PathLike) -> list[str]:
    """Returns what is wrong with a folder that `export_vbench` wrote; empty if VBench can read it.

    Every clip is opened: its frames, its rate and its size are counted.

    Raises:
        UserError: if the folder is none of those.
    """
    out = as_path(out)
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        wanted = manifest["clips"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} holds no {MANIFEST}; make it with `qdit export-vbench`.") from None
    present = {p.name for p in (out / CLIPS).iterdir()} if (out / CLIPS).is_dir() else set()
    wrong = [f"missing: {name}" for name in wanted if name not in present]
    wrong += [f"not a clip of this export: {name}" for name in sorted(present - set(wanted))]
    expected = (manifest["frames"], manifest["fps"], tuple(manifest["size"]))
    for name in wanted:
        if name in present:
            wrong += [f"{name}: {text}" for text in clip_faults(out / CLIPS / name, *expected)]
    return wrong


def clip_faults(path: AnyPath, frames: int, fps: float, size: tuple[int, int]) -> list[str]:
    """Returns what a clip has other than it should."""
    try:
        found = film_facts(path)
    except (OSError, ValueError, RuntimeError) as error:
        return [f"cannot be read ({str(error).splitlines()[0][:80]})"]
    faults = []
    if found.frames != frames:
        faults.append(f"{found.frames} frames, not {frames}")
    if abs(found.fps - fps) > 0.01 * fps:
        faults.append(f"{found.fps:g} frames per second, not {fps:g}")
    if found.size != size:
        faults.append(f"{found.size[0]}x{found.size[1]} pixels, not {size[0]}x{size[1]}")
    return faults
