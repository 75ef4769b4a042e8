"""Blocks that a stopped `qdit quantize` has learned, kept beside OUT for the same command.

settings.json   what the blocks depend on
0000.npz, ...   finished blocks, see `ptq.reconstruct_params`; of experts in folders by their names
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from qdit_jax.checkpoint import Checkpoint, fingerprint, first_difference
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, files_below, is_remote, locked, remove_folder, replaced_file
from qdit_jax.methods import CalibrationData, method_named
from qdit_jax.recipes import Recipe

SETTINGS = "settings.json"


def kept_blocks(
    out: AnyPath,
    method: str,
    checkpoint: Checkpoint,
    recipe: Recipe,
    data: CalibrationData,
    force: bool,
) -> AbstractContextManager[AnyPath | None]:
    """Returns the context of `kept_folder`; that of None where the method learns no blocks."""
    if not method_named(method).learns_blocks:
        return nullcontext()
    settings = fingerprint(
        checkpoint=(checkpoint.model, checkpoint.params),
        method=method,
        recipe=recipe.to_json(),
        data=data,
    )
    return kept_folder(out, settings, force)


@contextmanager
def kept_folder(out: AnyPath, settings: Mapping[str, Any], force: bool) -> Iterator[AnyPath]:
    """Yields the folder `.OUT.unfinished`, locked for this process; removed on success.

    It is removed too if the context fails before a block is finished.

    Args:
        settings: all that the blocks depend on, in JSON's types.
        force: start from scratch if the folder holds blocks of other settings.

    Raises:
        UserError: if the folder holds blocks of other settings and `force` is off, or another
            process writes to it.
    """
    target = out if is_remote(out) else Path(os.path.realpath(out))
    folder = target.with_name(f".{target.name}.unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as is_ours:
        if is_ours is False:
            raise UserError(f"another process writes to {folder} now; wait for it.")
        begin(folder, settings, force)
        try:
            yield folder
        except BaseException:
            if not has_blocks(folder):
                remove_folder(folder)
            raise
        remove_folder(folder)


def begin(folder: AnyPath, settings: Mapping[str, Any], force: bool) -> None:
    """Makes the folder one of these settings, and says so if blocks are read from it."""
    file = folder / SETTINGS
    if has_blocks(folder):
        try:
            differing = first_difference(json.loads(file.read_text()), settings)
        except (OSError, ValueError, AttributeError):
            differing = SETTINGS
        if differing is None:
            logging.getLogger("qdit_jax").info("resuming from %s", folder)
            return
        if not force:
            raise UserError(
                f"{folder} holds the blocks of an unfinished command with other settings or another "
                f"checkpoint (its {differing} is not the same); use the same to continue it, another "
                "OUT, or --force to start from scratch."
            )
    remove_folder(folder, keep=SETTINGS)
    with replaced_file(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))


def has_blocks(folder: AnyPath) -> bool:
    """Returns whether a block is finished."""
    if not folder.is_dir():
        return False
    return any(re.search(r"(^|/)\d+\.npz$", name) for name in files_below(folder))
