"""What 14 bits of a sum cost a product of FP8, beside what FP8 itself costs: the table of docs/kernels.md.

    python experiments/tables/fp8_sums.py

Tensor cores of NVIDIA's Hopper are said to align 32 products and the sum before to the greatest of them, and to
lose what is 14 bits below it. That is emulated here, in NumPy, of random operands in E4M3 with a scale per token and per
output channel: with a sum of its own for every 128 input channels, as the kernel `gpu_fp8` has it, and with one throughout.
Errors are shares of the exact product's root mean square. Nothing is measured on a GPU. Takes 10 seconds on one core;
expected: 3 to 4 % by FP8 itself, .01 to .05 % by sums of runs.

Dimensions: M tokens, N output channels, K input channels.
"""

from __future__ import annotations

import argparse

import ml_dtypes
import numpy as np

RUN = 128  # input channels that have a sum of their own
ADDENDS = 32  # of one instruction
BITS = 14
MOST = 448  # of E4M3


def narrow_sums(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Returns `x @ w.T` `[M, N]` in sums of `BITS` bits, of `x [M, K]` and `w [N, K]`."""
    sums = np.zeros((len(x), len(w)))
    for start in range(0, x.shape[1], ADDENDS):
        part = slice(start, start + ADDENDS)
        addends = x[:, None, part] * w[None, :, part]
        addends = np.concatenate([addends, sums[..., None]], axis=-1)
        _, exponent = np.frexp(np.abs(addends).max(axis=-1, keepdims=True))
        unit = 2.0 ** (exponent - BITS)
        sums = (np.trunc(addends / unit) * unit).sum(axis=-1)
    return sums


def sums_of_runs(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Returns the same, where each run of channels has its own sums, which are added up exactly."""
    runs = [slice(start, start + RUN) for start in range(0, x.shape[1], RUN)]
    return np.sum([narrow_sums(x[:, run], w[:, run]) for run in runs], axis=0)


def errors(num_channels: int, outliers: bool, seed: int = 0) -> dict[str, float]:
    """Returns the errors of FP8, and of its sums: of runs, throughout, and in float32."""
    rng = np.random.default_rng(seed)
    x, w = (rng.normal(size=(32, num_channels)) for _ in range(2))
    if outliers:
        x[:, ::97] *= 50
        w[:, ::61] *= 10
    (codes, scale), (weights, channel_scale) = map(elements, (x, w))
    exact = codes @ weights.T
    wide = np.asarray(codes, np.float32) @ np.asarray(weights, np.float32).T
    return {
        "FP8": share(exact * scale * channel_scale.T, x @ w.T),
        "runs": share(sums_of_runs(codes, weights), exact),
        "throughout": share(narrow_sums(codes, weights), exact),
        "float32": share(wide.astype(np.float64), exact),
    }


def elements(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns values in E4M3, and the scale of each row `[M, 1]`."""
    scale = np.abs(values).max(axis=1, keepdims=True) / MOST
    return (values / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64), scale


def share(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the root mean square of a difference in units of what is expected."""
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("| inputs by weights, E4M3 | quantization | runs of 128 | throughout | float32 |")
    print("|---|---|---|---|---|")
    for outliers in (False, True):
        for num_channels in (1152, 4608):
            found = errors(num_channels, outliers)
            name = "outliers x 50 and x 10" if outliers else "normal"
            print(f"| {name}, K = {num_channels} | ", end="")
            print(f"{found['FP8']:.1%} | {found['runs']:.3%} | ", end="")
            print(f"{found['throughout']:.3%} | {found['float32']:.0e} |")


if __name__ == "__main__":
    main()
