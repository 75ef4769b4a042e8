"""Prompts embedded on the command line: for `qdit embed-text`, and for `qdit sample --prompt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.options import refuse_inert
from qdit_jax.cli.progress import Bar
from qdit_jax.cli.prompts_option import Inputs, fitted, shape_of
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike
from qdit_jax.text import Embedded, check_extra, embed_prompts, pipeline_of

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint


def embedded(folder: PathLike, prompts: Sequence[str], **settings: Any) -> Embedded:
    """Returns prompts as a condition, with a bar; prints its notes. See `embed_prompts`."""
    _, row = pipeline_of(folder, settings.get("pipeline"))
    count = len(prompts) + (settings.get("null") is not None)
    with Bar(count * len(row.encoders), "prompt", "embedding") as bar:
        found = embed_prompts(folder, prompts, progress_fn=bar.tell, **settings)
    for note in found.notes:
        print(f"note: {note}")
    return found


def embedded_prompts(options: Mapping[str, Any], checkpoint: Checkpoint) -> Inputs:
    """Returns what `--prompt` says, embedded by the encoders in `--text-encoders`.

    The null condition is the empty prompt, as in published pipelines, where the network has any.

    Raises:
        UserError: if options lack or contradict each other, or the network takes no prompts.
    """
    prompts, folder = options["prompt"], options["text_encoders"]
    if not prompts:
        refuse_inert(options, {"text_encoders": None}, "it embeds a --prompt")
    reason = "--prompt says what to sample"
    refuse_inert(options, {"embeds": None, "prompts_from": None, "labels": None}, reason)
    if not isinstance(checkpoint.model.example_condition(1), Mapping):
        raise UserError("--prompt has no effect: this model takes no text; use --labels.")
    check_extra("--prompt")
    if folder is None:
        raise UserError(
            "--prompt needs --text-encoders DIR, the diffusers folder whose text encoders the model "
            "was trained with; or embed prompts first (`qdit embed-text`), and give --embeds."
        )
    null = "" if checkpoint.model.has_null and options["guidance"] != 1 else None
    found = embedded(folder, prompts, null=null)
    shape = shape_of(options, checkpoint)
    condition = fitted(found.condition, checkpoint, shape, options, f"--text-encoders {folder}")
    return Inputs(condition, found.prompts, shape)
