"""The common PyTorch port of the Inception network that FID is measured with.

The file is `pt_inception-2015-12-05`: torchvision's layer names, 1008 classes, no auxiliary head.
"""

from __future__ import annotations

from qdit_convert.plan import Example, Leaf, Plan, affine, convolution, norm
from qdit_convert.tensors import StateDict

NUM_CLASSES = 1008
# name: (channels in, channels out, kernel rows, kernel columns)
Conv = tuple[int, int, int, int]

STEM: dict[str, Conv] = {
    "Conv2d_1a_3x3": (3, 32, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (32, 64, 3, 3),
    "Conv2d_3b_1x1": (64, 80, 1, 1),
    "Conv2d_4a_3x3": (80, 192, 3, 3),
}


def inception_plan(state: StateDict) -> Plan:
    """Returns the plan for the network; its config is the number of classes."""
    leaves: list[Leaf] = []
    for name, (before, after, rows, columns) in convolutions().items():
        path = name.replace(".", "/")
        shape = (after, before, rows, columns)
        leaves.append(Leaf(f"{path}/conv/kernel", (f"{name}.conv.weight",), (shape,), convolution))
        leaves += norm(f"{path}/bn", f"{name}.bn", after)
        for new, old in (("mean", "running_mean"), ("var", "running_var")):
            leaves.append(Leaf(f"{path}/bn/{new}", (f"{name}.bn.{old}",), ((after,),)))
    leaves += affine("fc", "fc", (NUM_CLASSES, 2048))
    counters = frozenset(k for k in state.tensors if k.endswith(".bn.num_batches_tracked"))
    return Plan("inception", {"num_classes": NUM_CLASSES}, tuple(leaves), ignored=counters)


def inception_example() -> Example:
    """Returns the network, which has one size."""
    return Example(inception_plan(StateDict("example", {})).leaves)


def convolutions() -> dict[str, Conv]:
    """Returns all convolutions of the network by name."""
    blocks = {
        "Mixed_5b": _block_a(192, 32),
        "Mixed_5c": _block_a(256, 64),
        "Mixed_5d": _block_a(288, 64),
        "Mixed_6a": _block_b(288),
        "Mixed_6b": _block_c(768, 128),
        "Mixed_6c": _block_c(768, 160),
        "Mixed_6d": _block_c(768, 160),
        "Mixed_6e": _block_c(768, 192),
        "Mixed_7a": _block_d(768),
        "Mixed_7b": _block_e(1280),
        "Mixed_7c": _block_e(2048),
    }
    mixed = {
        f"{block}.{name}": conv for block, part in blocks.items() for name, conv in part.items()
    }
    return {**STEM, **mixed}


def _block_a(before: int, pool: int) -> dict[str, Conv]:
    return {
        "branch1x1": (before, 64, 1, 1),
        "branch5x5_1": (before, 48, 1, 1),
        "branch5x5_2": (48, 64, 5, 5),
        "branch3x3dbl_1": (before, 64, 1, 1),
        "branch3x3dbl_2": (64, 96, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (before, pool, 1, 1),
    }


def _block_b(before: int) -> dict[str, Conv]:
    return {
        "branch3x3": (before, 384, 3, 3),
        "branch3x3dbl_1": (before, 64, 1, 1),
        "branch3x3dbl_2": (64, 96, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    }


def _block_c(before: int, width: int) -> dict[str, Conv]:
    return {
        "branch1x1": (before, 192, 1, 1),
        "branch7x7_1": (before, width, 1, 1),
        "branch7x7_2": (width, width, 1, 7),
        "branch7x7_3": (width, 192, 7, 1),
        "branch7x7dbl_1": (before, width, 1, 1),
        "branch7x7dbl_2": (width, width, 7, 1),
        "branch7x7dbl_3": (width, width, 1, 7),
        "branch7x7dbl_4": (width, width, 7, 1),
        "branch7x7dbl_5": (width, 192, 1, 7),
        "branch_pool": (before, 192, 1, 1),
    }


def _block_d(before: int) -> dict[str, Conv]:
    return {
        "branch3x3_1": (before, 192, 1, 1),
        "branch3x3_2": (192, 320, 3, 3),
        "branch7x7x3_1": (before, 192, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    }


def _block_e(before: int) -> dict[str, Conv]:
    return {
        "branch1x1": (before, 320, 1, 1),
        "branch3x3_1": (before, 384, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (before, 448, 1, 1),
        "branch3x3dbl_2": (448, 384, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (before, 192, 1, 1),
    }
