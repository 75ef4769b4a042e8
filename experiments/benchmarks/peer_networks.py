"""The same stack of MLP blocks in Flax linen, Flax NNX and torch, with the same weights."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

Weights = list[dict[str, np.ndarray]]  # of each block: up [D, 4D], down [4D, D]


def weights_of(width: int, depth: int) -> Weights:
    """Returns random kernels with a few strong input channels, as trained networks have them."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(depth):
        block = {}
        for name, (k, n) in {"up": (width, 4 * width), "down": (4 * width, width)}.items():
            kernel = rng.standard_normal((k, n)) / np.sqrt(k)
            kernel[rng.choice(k, k // 64, replace=False)] *= 4
            block[name] = kernel.astype(np.float32)
        found.append(block)
    return found


class LinenNet(nn.Module):
    """`x + down(gelu(up(x)))`, block after block."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.depth):
            hidden = nn.gelu(nn.Dense(4 * self.width, use_bias=False, name=f"up_{i}")(x))
            x = x + nn.Dense(self.width, use_bias=False, name=f"down_{i}")(hidden)
        return x


def linen_params(weights: Weights) -> dict[str, Any]:
    """Returns the weights as parameters of `LinenNet`."""
    named = ((f"{name}_{i}", w) for i, block in enumerate(weights) for name, w in block.items())
    return {name: {"kernel": jax.numpy.asarray(w)} for name, w in named}


class NnxBlock(nnx.Module):
    def __init__(self, block: dict[str, np.ndarray]) -> None:
        width, rngs = block["up"].shape[0], nnx.Rngs(0)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)
        self.up.kernel[...] = block["up"]
        self.down.kernel[...] = block["down"]

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(x)))


class NnxNet(nnx.Module):
    def __init__(self, weights: Weights) -> None:
        self.blocks = nnx.List([NnxBlock(block) for block in weights])

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


def torch_net(weights: Weights) -> Any:
    """Returns the network as a `torch.nn.Module`."""
    import torch

    def linear(kernel: np.ndarray) -> torch.nn.Linear:
        layer = torch.nn.Linear(*kernel.shape, bias=False)
        layer.weight.data = torch.from_numpy(kernel.T.copy())
        return layer

    class TorchNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.ModuleList(linear(block["up"]) for block in weights)
            self.down = torch.nn.ModuleList(linear(block["down"]) for block in weights)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for up, down in zip(self.up, self.down, strict=True):
                x = x + down(torch.nn.functional.gelu(up(x), approximate="tanh"))
            return x

    return TorchNet().eval()
