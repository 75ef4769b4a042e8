"""`--embeds`, `--prompts-from`, `--size` and `--frames`: prepared conditions and sizes of samples."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.options import (
    LARGEST_COUNT,
    AddArgument,
    positive_float,
    positive_int,
    refuse_inert,
)
from qdit_jax.cli.paths import path_option
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.types import Condition

WHOLE = re.compile("[0-9]+")
CLIPS = (".gif", ".mp4")
Size = tuple[int, int]


class PromptsMissingError(UserError):
    """A network takes prompts, and no file gives any."""


def add_embeds(add: AddArgument) -> None:
    """Adds the options of conditions by `add`, a parser's or a group's `add_argument`."""
    add(
        "--embeds",
        type=path_option,
        metavar="FILE",
        help="an .npz of prepared conditions, which networks that take prompts need: see `qdit embed-text`",
    )
    add(
        "--prompts-from",
        metavar="ROWS",
        help="which prompts of --embeds, such as 0-9,12 (all)",
    )


def add_size(add: AddArgument) -> None:
    """Adds the options of a sample's size."""
    add(
        "--size",
        type=size_option,
        metavar="HxW",
        help="rows x columns such as 480x832: pixels where the checkpoint has an autoencoder (or makes "
        "pixels), else of latents (the network's own)",
    )
    add("--frames", type=positive_int, help="frames of a video (the network's own)")
    add(
        "--fps",
        type=positive_float,
        help="frames per second: of clips (8), and for networks that take it beside the prompt",
    )


def size_option(text: str) -> Size:
    """Returns rows and columns of `HxW`; raises argparse's error if it cannot be read."""
    found = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", text.strip())
    if found is None or not int(found[1]) or not int(found[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be read; write rows x columns, such as 480x832"
        )
    return int(found[1]), int(found[2])


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What samples are made from, as options say.

    Attributes:
        conditions: of the file, or None: the network's classes, or none.
        prompts: their texts, where the file has them.
        shape: of one sample of the network; None is its own.
    """

    conditions: Condition = None
    prompts: tuple[str, ...] | None = None
    shape: tuple[int, ...] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Returns conditions and shape as keywords of the library."""
        return {"conditions": self.conditions, "shape": self.shape}

    @classmethod
    def of(cls, options: Mapping[str, Any], checkpoint: Checkpoint, path: PathLike) -> Inputs:
        """Returns the inputs that options ask for; prints what a size counts.

        Args:
            path: of the checkpoint, for messages.

        Raises:
            UserError: if the network takes prompts and there is no file, or something does not fit.
        """
        from qdit_jax.sampling import read_conditions

        embeds, shape = options["embeds"], shape_of(options, checkpoint)
        if embeds is None:
            refuse_inert(options, {"prompts_from": None}, "it chooses prompts of --embeds")
            check_needs_no_embeds(checkpoint, path)
            if not is_clip(options):
                refuse_inert(
                    {"fps": options.get("fps")}, {"fps": None}, "it goes with prompts or a clip"
                )
            return cls(shape=shape)
        text = options["prompts_from"]
        rows = None if text is None else chosen_rows(text, "--prompts-from", "a row")
        try:
            found = read_conditions(embeds, rows=rows)
        except UserError as error:
            raise UserError(f"--embeds {error}") from None
        condition = fitted(found.condition, checkpoint, shape, options, f"--embeds {embeds}")
        return cls(condition, found.prompts, shape)


def fitted(
    condition: Mapping[str, Any],
    checkpoint: Checkpoint,
    shape: tuple[int, ...] | None,
    options: Mapping[str, Any],
    source: str,
) -> dict[str, Any]:
    """Returns a condition with sizes where the network takes them, checked; `source` names it."""
    from qdit_jax.sampling import check_entries, with_sizes

    fps = options.get("fps")
    if fps is not None and is_clip(options):
        taken = checkpoint.model.example_condition(1)
        takes = isinstance(taken, Mapping) and "fps" in taken and "fps" not in condition
        fps = fps if takes else None  # it is the clip's
    return check_entries(checkpoint.model, with_sizes(checkpoint, condition, shape, fps), source)


def is_clip(options: Mapping[str, Any]) -> bool:
    """Returns whether a clip is written."""
    return getattr(options.get("out"), "suffix", None) in CLIPS


def check_needs_no_embeds(checkpoint: Checkpoint, path: PathLike) -> None:
    """Raises `PromptsMissingError` if the network takes prompts, which only a file can give."""
    example = checkpoint.model.example_condition(1)
    if isinstance(example, Mapping):
        raise PromptsMissingError(
            f"{path} takes prompts ({', '.join(example)}); give --embeds FILE, an .npz with these "
            "arrays, such as `qdit embed-text` writes."
        )


def shape_of(options: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[int, ...] | None:
    """Returns the shape of a sample that `--size` and `--frames` ask for; None is the network's."""
    from qdit_jax.sampling import size_unit, sized_shape

    size, frames = options.get("size"), options.get("frames")
    shape = sized_shape(checkpoint, size, frames)
    if size is not None:
        print(f"--size {size[0]}x{size[1]}: {size_unit(checkpoint)}")
    return shape


def chosen_rows(text: str, option: str, what: str) -> list[int]:
    """Returns the numbers in a list of numbers and ranges such as `0-9,12`.

    `what` one of them is stands in messages.

    Raises:
        UserError: if it cannot be read, or names nothing or too much.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not WHOLE.fullmatch(first) or (dash and not WHOLE.fullmatch(last)):
            raise UserError(f"{option} {text}: {part!r} is not {what}; use numbers such as 0-9,12.")
        if len(last or first) > 9:
            raise UserError(f"{option} {text}: {last or first} is out of range.")
        found += range(int(first), int(last or first) + 1)
        if len(found) > LARGEST_COUNT:
            raise UserError(f"{option} names more than {LARGEST_COUNT:,} samples; use fewer.")
    if not found:
        raise UserError(f"{option} {text} names nothing; a range runs from low to high.")
    return found
