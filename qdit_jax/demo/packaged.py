"""The table of packaged models: a further one is a file of weights and one row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from qdit_jax.checkpoint import Checkpoint, load
from qdit_jax.demo.captions import embed_captions, mixed_captions
from qdit_jax.files import AnyPath
from qdit_jax.models import asset


def no_prompts() -> None:
    """Returns None: the conditions are classes."""


@dataclasses.dataclass(frozen=True)
class Packaged:
    """One packaged model, and how it is shown.

    Attributes:
        weights: the file of its weights, in its authors' layout.
        title: of the report.
        shows: what it makes, for the help text.
        options: what `convert` must be told, for the weights are of no published size.
        num_samples, num_steps: by default; the quick ones are those of `--quick`.
        guidance: the scale by default: what makes its samples plain.
        prompts: the texts of its conditions, or None where they are all its classes.
        scored: whether the packaged classifier knows its pictures.
        group_sizes: of the recipes that are compared, the finer first.
    """

    weights: str
    title: str
    shows: str
    options: Mapping[str, Any]
    num_samples: int = 100
    num_steps: int = 50
    quick_samples: int = 20
    quick_steps: int = 10
    guidance: float = 1.5
    prompts: Callable[[], Sequence[str] | None] = no_prompts
    scored: bool = False
    group_sizes: tuple[int, int] = (32, 64)

    def convert(self, folder: AnyPath) -> Checkpoint:
        """Writes the packaged weights as a checkpoint and returns it as loaded from there."""
        import qdit_convert

        with resources.as_file(asset(self.weights)) as source:
            qdit_convert.convert(source, folder, force=True, **self.options)
        return load(folder)

    def conditions(self) -> dict[str, Any] | None:
        """Returns the embeddings of the prompts; None for all classes."""
        prompts = self.prompts()
        return None if prompts is None else embed_captions(prompts)


PACKAGED = {
    "digits": Packaged(
        weights="demo_dit.safetensors",
        title="A diffusion transformer in 4 to 8 bits",
        shows="digits of a class (DiT)",
        options={"num_heads": 4},
        scored=True,
    ),
    "text": Packaged(
        weights="demo_pixart.safetensors",
        title="A text-to-image transformer in 4 to 8 bits",
        shows="digits under a caption (PixArt)",
        options={"num_heads": 4, "interpolation_scale": 1.0},
        num_steps=20,
        prompts=mixed_captions,
    ),
    "video": Packaged(
        weights="demo_latte.safetensors",
        title="A video transformer in 4 to 8 bits",
        shows="moving digits of a class (Latte)",
        options={"num_heads": 3},
        num_samples=20,
        num_steps=20,
        quick_samples=10,
        guidance=2.5,
        group_sizes=(32, 48),
    ),
}
