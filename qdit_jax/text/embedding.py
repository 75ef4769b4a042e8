"""`embed_prompts`: a pipeline's folder and prompts to a condition.

Dimensions: N prompts, L tokens.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from qdit_jax.errors import UserError, check_counts
from qdit_jax.files import PathLike, as_path
from qdit_jax.text.encoders import Encoded
from qdit_jax.text.pipelines import Pipeline, default_length, pipeline_of

DTYPES = ("float32", "bfloat16")
NEEDED = ("torch", "transformers")


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """Prompts as a condition, N first; `notes` say what a reader of it should know."""

    condition: dict[str, np.ndarray]
    prompts: tuple[str, ...]
    pipeline: str
    notes: tuple[str, ...]


def check_extra(what: str) -> None:
    """Raises `UserError` if torch or transformers is not installed; `what` begins the sentence."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{what} needs {' and '.join(missing)}, which run the text encoders: "
            "pip install 'qdit-jax[text]'."
        )


def embed_prompts(
    folder: PathLike,
    prompts: Sequence[str],
    *,
    null: str | None = None,
    max_length: int | None = None,
    pipeline: str | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    progress_fn: Callable[..., object] = lambda event: None,
) -> Embedded:
    """Returns prompts as a condition, by the text encoders in a diffusers pipeline's folder.

    One encoder is in memory at a time.

    Args:
        null: a text for `null_*` entries: "" as most pipelines, or a negative prompt.
        max_length: tokens of the text; the pipeline's own by default.
        pipeline: a row of `PIPELINES`, for folders that do not say it.
        dtype: that the encoders compute in; the arrays are float32.
        progress_fn: called with the number of prompts done, for every encoder.

    Raises:
        UserError: if a package is not installed, or the folder lacks what the pipeline needs.
    """
    check_extra("embedding prompts")
    check_counts(
        batch_size=batch_size, **({} if max_length is None else {"max_length": max_length})
    )
    if not prompts:
        raise UserError("there is no prompt; give one or more.")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not supported; use {' or '.join(DTYPES)}.")
    name, row = pipeline_of(folder, pipeline)
    path = Path(as_path(folder))
    length = max_length or default_length(path, name, row)
    texts = [row.clean(text) for text in [*prompts, *([] if null is None else [null])]]
    notes = list(row.notes)
    found = encoded(row, path, texts, length, dtype, batch_size, notes, progress_fn)
    condition = row.join(found, length, path)
    if null is not None:
        last = {f"null_{entry}": values[-1:] for entry, values in condition.items()}
        condition = {entry: values[:-1] for entry, values in condition.items()} | last
    return Embedded(condition, tuple(prompts), name, tuple(notes))


def encoded(
    row: Pipeline,
    folder: Path,
    texts: Sequence[str],
    length: int,
    dtype: str,
    batch_size: int,
    notes: list[str],
    progress_fn: Callable[..., object],
) -> dict[str, Encoded]:
    """Returns what each encoder of a pipeline makes; an optional one may not be there."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found = {}
    for one in row.encoders:
        if one.encoder in row.optional and not (folder / one.encoder).is_dir():
            notes.append(f"{folder} has no {one.encoder}: its tokens are zeros, as the pipeline's")
            continue
        found[one.encoder] = one.encode(
            folder,
            texts,
            length,
            dtype=dtype,
            batch_size=batch_size,
            note_fn=notes.append,
            progress_fn=progress_fn,
        )
    return found
