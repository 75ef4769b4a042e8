"""`--first-frames`: what a video begins with, given as latents, or as pixels that are encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.options import AddArgument, positive_int, refuse_inert
from qdit_jax.cli.paths import path_option
from qdit_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from qdit_jax.checkpoint import Checkpoint


def add_first_frames(add: AddArgument) -> None:
    """Adds the options by `add`, a parser's or a group's `add_argument`."""
    add(
        "--first-frames",
        type=path_option,
        metavar="FILE",
        help="what videos begin with and keep, one clip per sample or cycled: an .npz with latents [N, F, "
        "h, w, C] as `qdit sample` writes them, or arr_0, uint8 [N, F, H, W, 3] (or images), which the "
        "autoencoder encodes. Of Open-Sora 1.2 and Wan (2.2 5B was trained with it)",
    )
    add(
        "--num-first-frames",
        type=positive_int,
        metavar="F",
        help="keep the last F frames of the clips in --first-frames, which the sample continues (all)",
    )


def first_frames_of(
    options: Mapping[str, Any], checkpoint: Checkpoint, shape: Sequence[int] | None
) -> np.ndarray | None:
    """Returns the given first frames as latents, checked; None if there are none.

    Raises:
        UserError: if the file holds neither latents nor clips, or they do not fit the network.
    """
    path, count = options["first_frames"], options["num_first_frames"]
    if path is None:
        refuse_inert(options, {"num_first_frames": None}, "it counts frames of --first-frames")
        return None
    from qdit_jax.sampling import checked_first_frames, shape_of_sample

    found = read_clips(path)
    if count is not None:
        if count > found.shape[1]:
            raise UserError(
                f"--num-first-frames {count}: {path} has clips of {found.shape[1]} frames."
            )
        found = found[:, -count:]
    model = checkpoint.model
    size = shape_of_sample(model, shape)
    if found.dtype.name == "uint8":
        found = encoded(found, checkpoint, size, f"--first-frames {path}")
    try:
        return checked_first_frames(model, found, size)
    except ValueError as error:
        raise UserError(f"--first-frames {path}: {error}") from None


def read_clips(path: Any) -> np.ndarray:
    """Returns the latents in a file, or its clips of 8 bits, `[N, F, ...]`; images are clips of one frame.

    Raises:
        UserError: if there is neither.
    """
    import numpy as np

    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            names = list(data.files) if hasattr(data, "files") else []
            name = next((n for n in ("latents", "arr_0") if n in names), None)
            found = data[name] if name is not None else None
    except (OSError, ValueError) as error:
        raise UserError(f"--first-frames {path} cannot be read: {error}.") from None
    if found is None:
        raise UserError(
            f"--first-frames {path} holds {', '.join(names) or 'nothing'}; give latents, or arr_0 of uint8."
        )
    if found.ndim == 4:
        found = found[:, None]
    if found.ndim != 5:
        raise UserError(f"--first-frames {path} holds {list(found.shape)}; give clips [N, F, ...].")
    return found


def encoded(
    clips: np.ndarray, checkpoint: Checkpoint, shape: Sequence[int], source: str
) -> np.ndarray:
    """Returns the latents of clips of 8 bits; those of a network of pixels are the pixels themselves.

    Raises:
        UserError: if there is no autoencoder, or it does not take such clips.
    """
    import jax.numpy as jnp
    import numpy as np

    from qdit_jax.sampling import encode

    pixels = clips.astype(np.float32) / 127.5 - 1
    if checkpoint.vae is None:
        if shape[-1] == clips.shape[-1]:
            return pixels
        raise UserError(f"{source} holds pixels, which only an autoencoder encodes; give --vae.")
    try:
        return np.asarray(encode(checkpoint.vae, jnp.asarray(pixels)))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
