"""Schedulers, a network that is a formula, and what diffusers makes of both.

`python tests/diffusion/scheduler_cases.py` (with diffusers) writes the recorded samples.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FILE = Path(__file__).resolve().parents[1] / "goldens" / "scheduler_walks.npz"
TRAINED = (np.linspace(0.02, 0.12, 500) ** 2).tolist()
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
DDPM = {"_class_name": "DDPMScheduler", "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
V = {"prediction_type": "v_prediction"}
ZERO = {"rescale_betas_zero_snr": True}
CASES = {
    "ddim": (DDIM, 10),
    "ddim_defaults": ({"_class_name": "DDIMScheduler"}, 10),
    "ddim_clip_range": (DDIM | {"clip_sample": True, "clip_sample_range": 0.4}, 10),
    "ddim_threshold": (DDIM | {"thresholding": True, "sample_max_value": 1.5}, 10),
    "ddim_threshold_ratio": (
        {
            "_class_name": "DDIMScheduler",
            "thresholding": True,
            "dynamic_thresholding_ratio": 0.7,
            "sample_max_value": 9.0,
        },
        10,
    ),
    "ddim_v": (DDIM | V, 10),
    "ddim_v_clip": (DDIM | V | {"clip_sample": True}, 10),
    "ddim_v_trained": (DDIM | V | {"trained_betas": TRAINED, "num_train_timesteps": 500}, 10),
    "ddim_sample": (DDIM | {"prediction_type": "sample"}, 10),
    "ddim_zero": (DDIM | ZERO, 10),
    "ddim_zero_v": (DDIM | ZERO | V | {"timestep_spacing": "trailing"}, 10),
    "ddim_zero_v_clip": (
        DDIM | ZERO | V | {"timestep_spacing": "trailing", "clip_sample": True},
        7,
    ),
    "ddim_zero_sample": (
        DDIM | ZERO | {"prediction_type": "sample", "timestep_spacing": "trailing"},
        10,
    ),
    "ddim_trailing": (DDIM | {"timestep_spacing": "trailing"}, 10),
    "ddim_trailing_7": (DDIM | {"timestep_spacing": "trailing"}, 7),
    "ddim_linspace": (DDIM | {"timestep_spacing": "linspace"}, 10),
    "ddim_7": (DDIM, 7),
    "ddim_1": (DDIM, 1),
    "ddim_offset": (DDIM | {"steps_offset": 1}, 10),
    "ddim_offset_7": (DDIM | {"steps_offset": 3, "set_alpha_to_one": False}, 7),
    "ddim_last_alpha": (DDIM | {"set_alpha_to_one": False}, 10),
    "ddim_trailing_last": (DDIM | {"timestep_spacing": "trailing", "steps_offset": 1}, 10),
    "ddim_scaled": (
        DDIM
        | {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "steps_offset": 1,
            "set_alpha_to_one": False,
        },
        10,
    ),
    "ddim_cosine": (DDIM | V | {"beta_schedule": "squaredcos_cap_v2"}, 10),
    "ddim_100": (DDIM | {"num_train_timesteps": 100}, 10),
    "ddpm_small": (DDPM | {"variance_type": "fixed_small"}, 10),
    "ddpm_small_log": (DDPM | {"variance_type": "fixed_small_log"}, 10),
    "ddpm_large": (DDPM | {"variance_type": "fixed_large"}, 10),
    "ddpm_large_offset": (DDPM | {"variance_type": "fixed_large", "steps_offset": 1}, 7),
    "ddpm_range": (DDPM | {"variance_type": "learned_range"}, 10),
    "ddpm_defaults": ({"_class_name": "DDPMScheduler"}, 10),
    "ddpm_v_trailing": (DDPM | V | {"timestep_spacing": "trailing"}, 7),
    "ddpm_v_zero": (DDPM | V | ZERO | {"timestep_spacing": "trailing"}, 7),
    "ddpm_sigmoid": (DDPM | {"beta_schedule": "sigmoid"}, 10),
    "ddpm_threshold": (DDPM | {"thresholding": True, "sample_max_value": 2.0}, 10),
    "flow": (FLOW, 10),
    "flow_shift": (FLOW | {"shift": 3.0}, 7),
    "flow_terminal": (FLOW | {"shift": 2, "shift_terminal": 0.1}, 5),
    "flow_500": (FLOW | {"num_train_timesteps": 500, "shift": 0.5}, 6),
}
SHAPE = (2, 4, 3, 5)  # [B, C, H, W]


def noises(num_steps: int) -> np.ndarray:
    """Returns the start and the noise of every step, `[1 + S, B, C, H, W]`."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((1 + num_steps, *SHAPE)).astype(np.float32)


def network(xp, x, timestep, num_timesteps, channels):
    """Returns a smooth function of `x` and the timestep, then a variance in [-1, 1]."""
    at = timestep / num_timesteps
    output = 0.8 * xp.cos(1.7 * x + 2.0 * at) + 0.3 * x - 0.2 * at
    return xp.concatenate([output, xp.sin(x)], channels)


def by_diffusers(config: dict, steps: int) -> np.ndarray:
    """Returns the samples of a scheduler of diffusers, `[B, C, H, W]`."""
    import diffusers
    import torch
    from diffusers.schedulers import scheduling_ddpm

    own = {k: v for k, v in config.items() if k != "_class_name"}
    scheduler = getattr(diffusers, config["_class_name"])(**own)
    scheduler.set_timesteps(steps)
    drawn = torch.from_numpy(noises(steps))
    learned = own.get("variance_type") == "learned_range"
    x, upcoming = drawn[0], []
    original = scheduling_ddpm.randn_tensor
    scheduling_ddpm.randn_tensor = lambda *_, **__: upcoming[-1]
    try:
        for at, noise in zip(scheduler.timesteps, drawn[1:], strict=True):
            upcoming.append(noise)
            output = network(torch, x, at, scheduler.config.num_train_timesteps, 1)
            x = scheduler.step(output if learned else output[:, : SHAPE[1]], at, x).prev_sample
    finally:
        scheduling_ddpm.randn_tensor = original
    return x.numpy()


if __name__ == "__main__":
    np.savez_compressed(FILE, **{name: by_diffusers(*case) for name, case in CASES.items()})
