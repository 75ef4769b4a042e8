"""The sampling process on the command line: sampler, steps and guidance, of `sample` and `evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qdit_jax.cli.guidance_option import Given, add_guidance, guidance_for
from qdit_jax.cli.options import (
    AddArgument,
    finite_float,
    guidance_channels,
    positive_float,
    refuse_inert,
)
from qdit_jax.diffusion import SAMPLERS, sampler_named
from qdit_jax.errors import UserError

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.diffusion import Sampler
    from qdit_jax.models import Network


def add_process(add: AddArgument) -> None:
    """Adds the options of the process by `add`, a parser's or a group's `add_argument`."""
    add(
        "--sampler",
        choices=tuple(SAMPLERS),
        help="the sampler (default: that of the checkpoint's scheduler, else the model's own: ddim for "
        "DiT, flow for SiT)",
    )
    add(
        "--steps",
        help="number of steps, spaced as by the checkpoint's scheduler if it has one; or a spacing as "
        "OpenAI's guided-diffusion writes it: ddim25 or 10,15,20 (50)",
    )
    add(
        "--shift",
        type=positive_float,
        help="of flow-euler, flow-dpm-solver++ and unipc: how far noise levels are moved toward the noise, 1 for not at "
        "all (default: the scheduler's; without one the model's own: 5 for Wan, 12 its A14B, 3 SD3)",
    )
    add(
        "--spacing",
        help="how steps are spaced, in place of the scheduler's or the model's own: of flow-euler, "
        "flow-dpm-solver++ and unipc uniform, trained, unipc, wan or dpm; of dpm-solver++ linspace, leading, trailing or "
        "continuous (as PixArt's authors)",
    )
    add("--eta", type=finite_float, help="noise of ddim: 0 for none, 1 for as much as ddpm (0)")
    add(
        "--clip",
        type=positive_float,
        help="clip the predicted clean sample to [-CLIP, CLIP] at every step",
    )
    add_guidance(add)
    add(
        "--guidance-channels",
        type=guidance_channels,
        metavar="N|all",
        help="how many channels are guided: a number, all (as diffusers does), or published: as "
        "many as the model's published sampler guides, 3 of DiT's 4 (published)",
    )


@dataclasses.dataclass(frozen=True)
class Process:
    """The options of the process with their defaults."""

    sampler: str | None = None
    steps: str = "50"
    eta: float = 0.0
    clip: float | None = None
    shift: float | None = None
    spacing: str | None = None
    guidance: Given | None = None
    guidance_channels: int | str = "published"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Process:
        """Returns the process of parsed options; those that are None have their default.

        Raises:
            UserError: if channels are chosen and guidance is off.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        process = cls(**{name: given[name] for name in names if given[name] is not None})
        if process.guidance == 1:
            reason = "--guidance 1 guides none"
            refuse_inert(vars(process), {"guidance_channels": "published"}, reason)
        return process

    def guidance_of(self, model: Network) -> Any:
        """Returns the guidance of a network: what was given, else its own; 1 where it takes none."""
        return guidance_for(model, self.guidance)

    @property
    def channels(self) -> int | str | None:
        """How many channels are guided, as the library takes it: None for all."""
        return None if self.guidance_channels == "all" else self.guidance_channels

    @property
    def settings(self) -> dict[str, Any]:
        """What records of a run say of the sampler; of later options those that were given."""
        later = {"shift": self.shift, "spacing": self.spacing}
        given = {name: value for name, value in later.items() if value is not None}
        return {"steps": self.steps, "eta": self.eta, "clip": self.clip, **given}

    def sampler_of(self, checkpoint: Checkpoint, shape: Sequence[int] | None = None) -> Sampler:
        """Returns the sampler, on the schedule that the checkpoint was trained on.

        `shape` is that of one sample, the network's own if None.

        Raises:
            UserError: if it does not fit what the network predicts, or the number of steps.
        """
        from qdit_jax import sampling

        name = self.sampler or sampling.own_sampler(checkpoint)
        row, model = sampler_named(name), checkpoint.model
        if model.prediction not in row.predictions:
            raise UserError(f"--sampler {name}: {sampling.fitting_samplers(model)}")
        given: dict[str, Any] = {"shift": self.shift, "spacing": self.spacing}
        given["eta"] = self.eta or None
        for option, value in given.items():
            try:
                row.chosen(**{option: value})
            except ValueError as error:
                raise UserError(f"--{option} {value}: {error}") from None
        if "clip" not in row.options:
            refuse_inert(vars(self), {"clip": None}, f"{name} predicts no data to clip")
        if not row.spacings and not (self.steps.isdecimal() and int(self.steps) > 0):
            raise UserError(f"--steps {self.steps}: {name} takes a positive number.")
        return sampling.checkpoint_sampler(
            checkpoint,
            self.steps,
            sampler=name,
            clip=self.clip,
            shape=shape,
            **given | {"eta": self.eta},
        )

    def scheduler_text(self, checkpoint: Checkpoint) -> str | None:
        """Returns in words how the checkpoint's own scheduler is followed; None if it has none."""
        from qdit_jax import sampling

        text = sampling.sampler_text(checkpoint)
        if text is None:
            return None
        changes = [f"--sampler {self.sampler}"] if self.sampler is not None else []
        changes += [] if self.steps.isdecimal() else [f"--steps {self.steps}"]
        changes += [] if self.clip is None else [f"--clip {self.clip:g}"]
        changes += [] if self.shift is None else [f"--shift {self.shift:g}"]
        changes += [] if self.spacing is None else [f"--spacing {self.spacing}"]
        ending = f"; changed by {', '.join(changes)}" if changes else ""
        return f"sampling as the checkpoint's scheduler says: {text}{ending}"
