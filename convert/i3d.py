"""The common PyTorch port of I3D on Kinetics, that FVD is measured with (`i3d_pretrained_400.pt`)."""

from __future__ import annotations

import numpy as np

from qdit_convert.plan import Example, Leaf, Plan, norm
from qdit_convert.tensors import StateDict
from qdit_jax.models import I3D_BLOCKS

NUM_CLASSES = 400
BRANCHES = ("b0", "b1a", "b1b", "b2a", "b2b", "b3b")
# name: (channels in, channels out, size of the kernel)
Conv = tuple[int, int, int]


def space_time(array: np.ndarray) -> np.ndarray:
    """Returns the kernel THWIO of torch's OITHW."""
    return array.transpose(2, 3, 4, 1, 0)


def i3d_plan(state: StateDict) -> Plan:
    """Returns the plan for the network, which has one size."""
    leaves: list[Leaf] = []
    for name, (before, after, size) in convolutions().items():
        path = name.replace(".", "/")
        shape = (after, before, size, size, size)
        leaves.append(
            Leaf(f"{path}/conv3d/kernel", (f"{name}.conv3d.weight",), (shape,), space_time)
        )
        leaves += norm(f"{path}/bn", f"{name}.bn", after)
        for new, old in (("mean", "running_mean"), ("var", "running_var")):
            leaves.append(Leaf(f"{path}/bn/{new}", (f"{name}.bn.{old}",), ((after,),)))
    shape = (NUM_CLASSES, 1024, 1, 1, 1)
    leaves += [
        Leaf("logits/conv3d/kernel", ("logits.conv3d.weight",), (shape,), space_time),
        Leaf("logits/conv3d/bias", ("logits.conv3d.bias",), ((NUM_CLASSES,),)),
    ]
    counters = frozenset(k for k in state.tensors if k.endswith(".bn.num_batches_tracked"))
    return Plan("i3d", {"num_classes": NUM_CLASSES}, tuple(leaves), ignored=counters)


def i3d_example() -> Example:
    """Returns the network, which has one size."""
    return Example(i3d_plan(StateDict("example", {})).leaves)


def convolutions() -> dict[str, Conv]:
    """Returns all convolutions but the last by name."""
    found: dict[str, Conv] = {
        "Conv3d_1a_7x7": (3, 64, 7),
        "Conv3d_2b_1x1": (64, 64, 1),
        "Conv3d_2c_3x3": (64, 192, 3),
    }
    before = 192
    for block, (b0, b1a, b1b, b2a, b2b, b3b) in I3D_BLOCKS.items():
        inputs = (before, before, b1a, before, b2a, before)
        widths = (b0, b1a, b1b, b2a, b2b, b3b)
        for name, given, width in zip(BRANCHES, inputs, widths, strict=True):
            found[f"{block}.{name}"] = (given, width, 3 if name in ("b1b", "b2b") else 1)
        before = b0 + b1b + b2b + b3b
    return found
