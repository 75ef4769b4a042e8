"""What a user says of a network that its file does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict


class Told(TypedDict, total=False):
    """The fields of `Choices`, as keywords of `convert` and `read_model`."""

    model: str | None
    num_heads: int | None
    num_classes: int | None
    input_size: int | tuple[int, ...] | None
    noise_time: int | None
    scaling_factor: float | None
    shift_factor: float | None
    interpolation_scale: float | None
    space_scale: float | None
    time_scale: float | None
    rope_axes: tuple[int, ...] | list[int] | None


@dataclass(frozen=True)
class Choices:
    """What the user says of a network that its file does not; each is also an option of `qdit convert`.

    Attributes:
        model: a published size such as `"DiT-XL/2"`, to be checked against the file.
        num_heads: for sizes that are not published; no shape depends on it.
        num_classes: without the null class; decides whether the label table ends with one.
        input_size: rows and columns of the latent, of a video frames, rows and columns.
        noise_time: the time that a SiT was trained to see at pure noise, 0 (SiT) or 1 (REPA).
        scaling_factor, shift_factor: of an autoencoder's latents, in place of what its config.json
            says; needed where nothing says them and the latents have not 4 channels.
        interpolation_scale: by which a PixArt's positions are divided, where it is not as published
            for its size.
        space_scale, time_scale: by which STDiT's positions are divided, likewise.
        rope_axes: channels of a head that turn with each axis of position (FLUX).
    """

    model: str | None = None
    num_heads: int | None = None
    num_classes: int | None = None
    input_size: int | tuple[int, ...] | None = None
    noise_time: int | None = None
    scaling_factor: float | None = None
    shift_factor: float | None = None
    rope_axes: tuple[int, ...] | list[int] | None = None
    interpolation_scale: float | None = None
    space_scale: float | None = None
    time_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("input_size", "rope_axes"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
