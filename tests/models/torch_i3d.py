"""A torch definition of FVD's I3D as a function of its weights, in the names of the common port."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

POOLED = {"Mixed_3b": ((1, 3, 3), (1, 2, 2)), "Mixed_4b": (3, 2), "Mixed_5b": (2, 2)}
BLOCKS = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")


def padded(x, kernel, stride):
    """Pads as TensorFlow does: the output has ceil(size / stride) entries, the odd one behind."""
    kernels = (kernel,) * 3 if isinstance(kernel, int) else kernel
    strides = (stride,) * 3 if isinstance(stride, int) else stride
    pads = []
    for size, k, s in reversed(list(zip(x.shape[2:], kernels, strides, strict=True))):
        total = max(k - (size % s or s), 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def unit(state, name, x, stride=1):
    weight = state[f"{name}.conv3d.weight"]
    x = F.conv3d(padded(x, weight.shape[-1], stride), weight, stride=stride)
    stored = (
        state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return torch.relu(F.batch_norm(x, *stored, eps=1e-3))


def pool(x, kernel, stride):
    return F.max_pool3d(padded(x, kernel, stride), kernel, stride)


def mixed(state, name, x):
    def at(branch, x):
        return unit(state, f"{name}.{branch}", x)

    parts = [
        at("b0", x),
        at("b1b", at("b1a", x)),
        at("b2b", at("b2a", x)),
        at("b3b", pool(x, 3, 1)),
    ]
    return torch.cat(parts, 1)


def logits_of(state, x):
    """Returns `[B, 400]` of `[B, 3, T, 224, 224]`."""
    x = pool(unit(state, "Conv3d_1a_7x7", x, 2), (1, 3, 3), (1, 2, 2))
    x = unit(state, "Conv3d_2c_3x3", unit(state, "Conv3d_2b_1x1", x))
    for block in BLOCKS:
        name = f"Mixed_{block}"
        if name in POOLED:
            x = pool(x, *POOLED[name])
        x = mixed(state, name, x)
    x = F.avg_pool3d(x, (2, 7, 7), 1)
    x = F.conv3d(x, state["logits.conv3d.weight"], state["logits.conv3d.bias"])
    return x.mean((2, 3, 4))
