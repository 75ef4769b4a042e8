"""The table of samplers: a row names the function that returns a sampler, and its options.

Nothing here imports JAX, so that names and options can be read fast; the function is imported when
it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

VELOCITY = "velocity"
# Predictions of networks for samplers on a schedule of betas.
NOISE = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class SamplerRow:
    """One row of the table of samplers.

    Attributes:
        name: its name for `--sampler`.
        make: `module:function` of `make(steps, **options) -> Sampler`. A sampler for `NOISE` has
            the option `schedule`; one for a velocity has `edges` (times from 0 at noise to 1 at the
            data) or `sigmas` (noise levels from 1 to 0), and `OF_VELOCITY`.
        predictions: the outputs of networks that it samples with (`models.Network.prediction`).
        options: the arguments of `make` beside the number of steps.
        spacings: whether steps may be a published spacing such as `"ddim25"`.
        idea: one sentence on the rule of a step.
        paper: where the rule is from.
    """

    name: str
    make: str
    predictions: tuple[str, ...]
    options: tuple[str, ...]
    spacings: bool
    idea: str
    paper: str

    @property
    def make_fn(self) -> Callable[..., Any]:
        """Returns the function that returns the sampler."""
        module, _, name = self.make.partition(":")
        return getattr(import_module(module), name)

    @property
    def is_flow(self) -> bool:
        """Returns whether it follows a velocity from noise to the data."""
        return VELOCITY in self.predictions

    def chosen(self, **given: object) -> dict[str, Any]:
        """Returns the given options of `make` that are not None.

        Raises:
            ValueError: if one is not an option of this sampler.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        for name, value in chosen.items():
            if name not in self.options:
                *others, last = [row.name for row in SAMPLERS.values() if name in row.options] or [
                    "no sampler"
                ]
                having = f"{', '.join(others)} and {last}" if others else last
                raise ValueError(
                    f"{name}={value} is an option of {having}, not of {self.name}; leave it out."
                )
        return chosen


OF_VELOCITY = ("flow_times", "velocity_to")
OF_NOISE = ("schedule", "clip", "predict_fn", "limit_fn")
SAMPLERS: dict[str, SamplerRow] = {
    row.name: row
    for row in (
        SamplerRow(
            "ddim",
            "qdit_jax.diffusion.samplers:ddim",
            NOISE,
            ("eta", *OF_NOISE),
            spacings=True,
            idea="Steps to the noise level of the next timestep, with as much new noise as eta says.",
            paper="Denoising Diffusion Implicit Models, arXiv:2010.02502",
        ),
        SamplerRow(
            "ddpm",
            "qdit_jax.diffusion.samplers:ddpm",
            NOISE,
            ("variance_fn", *OF_NOISE),
            spacings=True,
            idea="Draws each step from the posterior, with a learned or fixed variance.",
            paper="Denoising Diffusion Probabilistic Models, arXiv:2006.11239",
        ),
        SamplerRow(
            "dpm-solver++",
            "qdit_jax.diffusion.dpm_solver:dpm_solver_pp",
            NOISE,
            ("spacing", *OF_NOISE),
            spacings=True,
            idea="Extrapolates the predicted data from two steps, in the half logarithmic SNR.",
            paper="DPM-Solver++, arXiv:2211.01095",
        ),
        SamplerRow(
            "flow",
            "qdit_jax.diffusion.velocity_flow:flow",
            (VELOCITY,),
            ("solve_fn", "edges", *OF_VELOCITY),
            spacings=False,
            idea="Follows the velocity over intervals of time by Euler's or Heun's rule.",
            paper="SiT, arXiv:2401.08740",
        ),
        SamplerRow(
            "flow-euler",
            "qdit_jax.diffusion.flow_matching:flow_euler",
            (VELOCITY,),
            ("shift", "spacing", "sigmas", *OF_VELOCITY),
            spacings=False,
            idea="Follows the velocity by Euler's rule over noise levels shifted toward the noise.",
            paper="Scaling Rectified Flow Transformers, arXiv:2403.03206",
        ),
        SamplerRow(
            "flow-dpm-solver++",
            "qdit_jax.diffusion.dpm_solver_flow:flow_dpm_solver_pp",
            (VELOCITY,),
            ("shift", "spacing", "sigmas", *OF_VELOCITY),
            spacings=False,
            idea="Extrapolates the predicted data from two steps, in a flow's half logarithmic SNR.",
            paper="DPM-Solver++, arXiv:2211.01095",
        ),
        SamplerRow(
            "unipc",
            "qdit_jax.diffusion.unipc_flow:unipc",
            (VELOCITY,),
            ("shift", "spacing", "sigmas", *OF_VELOCITY),
            spacings=False,
            idea="Predicts with the data of two steps, then corrects by the next step's prediction.",
            paper="UniPC, arXiv:2302.04867",
        ),
    )
}


def sampler_named(name: str) -> SamplerRow:
    """Returns a row of the table; raises `ValueError` for a name that it lacks."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r} is not known; use one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]


def samplers_of(prediction: str) -> list[str]:
    """Returns the names of the samplers that take what a network returns."""
    return [row.name for row in SAMPLERS.values() if prediction in row.predictions]
