"""The settings of a diffusers scheduler (scheduler_config.json), as a table of what is understood.

A scheduler's file describes two things: the process that the network was trained on (betas, what
the network predicts), and how samples are drawn (the solver, its timesteps, what is clipped). The
process must be understood. The solver is kept if it is DDIM, DDPM, DPM-Solver++ (2M, also of a flow),
Euler's rule of a flow or UniPC (order 2) of a flow; any other one is replaced by DDIM or Euler's rule on the same
process, and `Scheduler.because` says which settings made it another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qdit_jax.diffusion.settings import HARMLESS, Setting, shown, understood
from qdit_jax.diffusion.table import sampler_named
from qdit_jax.errors import UserError

SAYS = "scheduler_config.json says"
NO_FLAG = "set it to false in the file if the samples may be drawn without it"
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

ABOUT = {
    name: HARMLESS
    for name in ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")
}
PROCESS = {
    "num_train_timesteps": Setting("whole", low=1, high=100_000, default=1000),
    "beta_start": Setting("number", low=1e-12, high=1, default=0.0001),
    "beta_end": Setting("number", low=1e-12, high=1, default=0.02),
    "beta_schedule": Setting("text", BETA_SCHEDULES, default="linear"),
    "trained_betas": Setting("numbers", optional=True),
    "prediction_type": Setting("text", PREDICTIONS, default="epsilon"),
    "rescale_betas_zero_snr": Setting("bool", default=False),
}
SPACING = {
    "timestep_spacing": Setting("text", ("leading", "trailing", "linspace"), default="leading"),
    "steps_offset": Setting("whole", low=0, high=100_000, default=0),
}
CLIPPING = {
    "clip_sample": Setting("bool", default=True),
    "clip_sample_range": Setting("number", low=1e-6, default=1.0),
}
THRESHOLDING = {
    "thresholding": Setting("bool", default=False),
    "dynamic_thresholding_ratio": Setting("number", low=0, high=1, default=0.995),
    "sample_max_value": Setting("number", low=1, default=1.0),
}
FINAL_ALPHA = {"set_alpha_to_one": Setting("bool", default=True)}
VARIANCE = {
    "variance_type": Setting(
        "text",
        ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
        default="fixed_small",
    )
}
# Of solvers that are replaced: settings of the solver alone have no effect.
SOLVER = {
    name: HARMLESS
    for name in (
        "algorithm_type",
        "disable_corrector",
        "euler_at_final",
        "final_sigmas_type",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "predict_x0",
        "set_alpha_to_one",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "steps_offset",
        "timestep_spacing",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "variance_type",
    )
} | {
    "timestep_type": Setting("text", ("discrete",), default="discrete", used=False),
    "use_flow_sigmas": Setting("bool", default=False),
    "flow_shift": Setting("number", low=1e-6, default=1.0),
    "use_dynamic_shifting": Setting("bool", (False,), default=False, used=False, remedy=NO_FLAG),
    "time_shift_type": HARMLESS,
    "shift_terminal": Setting("number", optional=True, used=False),
    "prediction_type": Setting("text", (*PREDICTIONS, "flow_prediction"), default="epsilon"),
}
FLOW = {
    "num_train_timesteps": PROCESS["num_train_timesteps"],
    "shift": Setting("number", low=1e-6, default=1.0),
    "shift_terminal": Setting("number", low=1e-9, high=1 - 1e-9, optional=True),
    # The shift of an image by its number of tokens; without it nothing reads the others.
    "use_dynamic_shifting": Setting("bool", default=False),
    "base_image_seq_len": Setting("whole", low=1, default=256),
    "max_image_seq_len": Setting("whole", low=1, default=4096),
    "base_shift": Setting("number", default=0.5),
    "max_shift": Setting("number", default=1.15),
    "time_shift_type": Setting("text", ("exponential", "linear"), default="exponential"),
} | {
    name: Setting("bool", (False,), default=False, used=False, remedy=NO_FLAG)
    for name in (
        "invert_sigmas",
        "stochastic_sampling",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "use_karras_sigmas",
    )
}
MULTISTEP_SPACING = SPACING | {
    "timestep_spacing": Setting("text", ("leading", "trailing", "linspace"), default="linspace")
}
NO_SIGMAS: dict[str, tuple[Any, ...]] = {
    name: (False,)
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
}
# The settings of a solver that is kept, beside its class's defaults; diffusers takes the names of
# other solvers' types for its own.
DPM_SOLVER: dict[str, tuple[Any, ...]] = NO_SIGMAS | {
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_order": (2,),
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf, None),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
}
UNIPC: dict[str, tuple[Any, ...]] = NO_SIGMAS | {
    "solver_order": (2,),
    "solver_type": ("bh2", "midpoint", "heun", "logrho"),
    "predict_x0": (True,),
    "lower_order_final": (True,),
    "disable_corrector": ([],),
    "solver_p": (None,),
    "final_sigmas_type": ("zero",),
    "thresholding": (False,),
}

OF_FLOWS: dict[str, tuple[Any, ...]] = {"thresholding": (False,)}  # and a flow's solver


@dataclass(frozen=True)
class SchedulerClass:
    """One class of schedulers: its sampler and its settings.

    Attributes:
        sampler: a name in `SAMPLERS`.
        table: its settings.
        replaced: whether `sampler` replaces a solver that this package does not have.
        kept: the values of the solver's settings with which it is not replaced, but is `own`.
        own: names in `SAMPLERS`: of betas, of a flow, or one of each.
    """

    sampler: str
    table: dict[str, Setting]
    replaced: bool = False
    kept: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    own: tuple[str, ...] = ()


DDIM_TABLE = ABOUT | PROCESS | SPACING | CLIPPING | THRESHOLDING | FINAL_ALPHA
DDPM_TABLE = ABOUT | PROCESS | SPACING | CLIPPING | THRESHOLDING | VARIANCE
MULTISTEP = SchedulerClass("ddim", ABOUT | PROCESS | SOLVER | THRESHOLDING, replaced=True)
PLAIN = SchedulerClass("ddim", ABOUT | PROCESS | SOLVER, replaced=True)
KDIFFUSION_BETAS = {
    "beta_start": Setting("number", low=1e-12, high=1, default=0.00085),
    "beta_end": Setting("number", low=1e-12, high=1, default=0.012),
}
KDIFFUSION = SchedulerClass("ddim", PLAIN.table | KDIFFUSION_BETAS, replaced=True)
HEUN = SchedulerClass(
    "ddim",
    KDIFFUSION.table | CLIPPING | {"clip_sample": Setting("bool", default=False)},
    replaced=True,
)
CLASSES: dict[str, SchedulerClass] = {
    "DDIMScheduler": SchedulerClass("ddim", DDIM_TABLE),
    "DDIMParallelScheduler": SchedulerClass("ddim", DDIM_TABLE),
    "DDPMScheduler": SchedulerClass("ddpm", DDPM_TABLE),
    "DDPMParallelScheduler": SchedulerClass("ddpm", DDPM_TABLE),
    "FlowMatchEulerDiscreteScheduler": SchedulerClass("flow-euler", ABOUT | FLOW),
    "FlowMatchHeunDiscreteScheduler": SchedulerClass("flow-euler", ABOUT | FLOW, replaced=True),
    "DPMSolverMultistepScheduler": SchedulerClass(
        "ddim",
        MULTISTEP.table | MULTISTEP_SPACING,
        True,
        DPM_SOLVER,
        ("dpm-solver++", "flow-dpm-solver++"),
    ),
    "DPMSolverSinglestepScheduler": MULTISTEP,
    "DEISMultistepScheduler": MULTISTEP,
    "UniPCMultistepScheduler": SchedulerClass("ddim", MULTISTEP.table, True, UNIPC, ("unipc",)),
    "EulerDiscreteScheduler": PLAIN,
    "EulerAncestralDiscreteScheduler": PLAIN,
    "LMSDiscreteScheduler": PLAIN,
    "PNDMScheduler": PLAIN,
    "HeunDiscreteScheduler": HEUN,
    "KDPM2DiscreteScheduler": KDIFFUSION,
    "KDPM2AncestralDiscreteScheduler": KDIFFUSION,
}
# A file may contain settings of other classes, which its own class ignores.
ANYWHERE = frozenset(name for row in CLASSES.values() for name in row.table)


@dataclass(frozen=True)
class Scheduler:
    """A scheduler that is understood.

    Attributes:
        class_name: its class in diffusers.
        sampler: a name in `SAMPLERS`.
        replaced: whether that sampler replaces a solver that this package does not have.
        settings: every used setting of its class, defaults filled in.
        ignored: settings in the file that are of other classes, which this one does not read.
        because: settings, with their values, for which a solver that this package has is replaced.
    """

    class_name: str
    sampler: str
    replaced: bool
    settings: Mapping[str, Any]
    ignored: tuple[str, ...] = ()
    because: tuple[str, ...] = ()

    @property
    def is_flow(self) -> bool:
        """Returns whether it describes the flow of a velocity, which has no betas."""
        return sampler_named(self.sampler).is_flow


def read_scheduler(config: Mapping[str, Any]) -> Scheduler:
    """Returns what a scheduler_config.json says; settings that it leaves out are its class's own.

    Raises:
        UserError: naming the setting and its value, if the file cannot be understood.
    """
    name = config.get("_class_name", "DDIMScheduler")
    if name not in CLASSES:
        raise UserError(
            f"{SAYS} _class_name={shown(name)}, which is not understood; use one of "
            f"{', '.join(CLASSES)}."
        )
    row = CLASSES[name]
    ignored = tuple(k for k in config if k not in row.table and k in ANYWHERE)
    own = {key: value for key, value in config.items() if key not in ignored}
    settings = understood(SAYS, own, row.table)
    if row.sampler == "flow-euler":
        return Scheduler(name, row.sampler, row.replaced, settings, ignored)
    flow = row.sampler == "ddim" and is_flow(settings)
    solver = next((name for name in row.own if sampler_named(name).is_flow == flow), "")
    because = other_settings(own, row.kept | (OF_FLOWS if flow else {})) if solver else ()
    kept = bool(solver) and not because
    if flow:
        settings = flow_settings(settings, config)
        sampler = solver if kept else "flow-euler"
        return Scheduler(name, sampler, not kept, settings, ignored, because)
    check_betas(settings, "num_train_timesteps" in config)
    check_signal(settings, row.replaced)
    sampler = solver if kept else row.sampler
    return Scheduler(name, sampler, row.replaced and not kept, settings, ignored, because)


def flow_settings(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a multi-step solver's flow as `FLOW` names them."""
    given = {
        "num_train_timesteps": settings["num_train_timesteps"],
        "shift": settings["flow_shift"],
        "shift_terminal": config.get("shift_terminal"),
    }
    return understood(SAYS, given, FLOW)


def other_settings(
    config: Mapping[str, Any], kept: Mapping[str, tuple[Any, ...]]
) -> tuple[str, ...]:
    """Returns the settings, with their values, with which a file has another solver than ours."""
    found = {name: config[name] for name in kept if name in config}
    return tuple(f"{k}={shown(v)}" for k, v in found.items() if v not in kept[k])


def is_flow(settings: Mapping[str, Any]) -> bool:
    """Returns whether a solver of either process is set to a flow."""
    flow = settings["prediction_type"] == "flow_prediction"
    if flow != settings.get("use_flow_sigmas", False):
        raise UserError(
            f"{SAYS} prediction_type={settings['prediction_type']!r} and use_flow_sigmas="
            f"{settings['use_flow_sigmas']}; a flow has 'flow_prediction' and True, anything else "
            "has neither."
        )
    return flow


def check_betas(settings: Mapping[str, Any], counted: bool) -> None:
    """Raises `UserError` if the betas that a file lists are none, or are not as many as it says."""
    betas, count = settings["trained_betas"], settings["num_train_timesteps"]
    if betas is None:
        return
    if not betas or not all(0 < beta <= 1 for beta in betas):
        raise UserError(f"{SAYS} trained_betas={shown(betas)}; each must be in (0, 1].")
    if counted and len(betas) != count:
        raise UserError(f"{SAYS} num_train_timesteps={count}, but trained_betas has {len(betas)}.")


def check_signal(settings: Mapping[str, Any], replaced: bool) -> None:
    """Raises `UserError` if a model of the noise is asked at a timestep without any signal."""
    if not settings["rescale_betas_zero_snr"] or settings["prediction_type"] != "epsilon":
        return
    if replaced or settings["timestep_spacing"] != "leading":
        raise UserError(
            f"{SAYS} rescale_betas_zero_snr=True and prediction_type='epsilon': sampling starts "
            "without any signal, where the noise says nothing of the data; use a DDIMScheduler with "
            "timestep_spacing='leading', which leaves the last timestep out, or correct what the "
            "network predicts."
        )


def check_fit(velocity: bool, learns_variance: bool, scheduler: Scheduler) -> None:
    """Raises `UserError` if a network does not return what its scheduler reads."""
    name = scheduler.class_name
    if velocity != scheduler.is_flow:
        kinds = ("noise", "a velocity") if scheduler.is_flow else ("a velocity", "noise")
        raise UserError(
            f"the network predicts {kinds[0]}, but a {name} reads {kinds[1]}; convert the pipeline again."
        )
    if scheduler.settings.get("variance_type") == "learned_range" and not learns_variance:
        raise UserError(
            f"{SAYS} variance_type='learned_range', but the network returns no variance; "
            "set it to 'fixed_small' or 'fixed_large'."
        )
