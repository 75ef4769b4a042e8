"""Two networks of one form, between which the timestep chooses, as one network with two experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qdit_convert.opened import Network
from qdit_convert.plan import Leaf
from qdit_jax.errors import UserError
from qdit_jax.models import EXPERTS

# The folders of the authors' text-to-video A14B, the expert of much noise first, and the timestep
# from which on that is run, which no file of theirs says.
AUTHORS_FOLDERS = ("high_noise_model", "low_noise_model")
AUTHORS_BOUNDARY = 875.0


def is_pair(path: Path) -> bool:
    """Returns whether `path` is a folder with the authors' two networks."""
    return all((path / name).is_dir() for name in AUTHORS_FOLDERS)


def one_of_a_pair(folder: Path) -> bool:
    """Returns whether `folder` is that of one of the authors' two networks."""
    return folder.name in AUTHORS_FOLDERS and is_pair(folder.absolute().parent)


def as_experts(label: str, found: Sequence[Network], boundary: float) -> Network:
    """Returns one network of two, whose tensors have their folder's name before their own.

    Args:
        found: the network of much noise, and that of little noise.
        boundary: the timestep from which on the first is run.

    Raises:
        UserError: if the two are not of one form.
    """
    high, low = found
    for name, value in high.plan.config.items():
        if low.plan.config.get(name) != value:
            raise UserError(
                f"{low.label} has {name}={low.plan.config.get(name)} and {high.label} has {value}; "
                "the two experts of a network must have one form."
            )
    if high.layout is not low.layout:
        raise UserError(f"{low.label} is a {low.layout.title}, {high.label} a {high.layout.title}.")
    leaves: list[Leaf] = []
    tensors, others = {}, {}
    for expert, network in zip(EXPERTS, found, strict=True):
        folder = Path(network.label).name
        leaves += [
            replace(
                leaf,
                path=f"{expert}/{leaf.path}",
                sources=tuple(f"{folder}.{key}" for key in leaf.sources),
                copies=tuple(f"{folder}.{key}" for key in leaf.copies),
            )
            for leaf in network.plan.leaves
        ]
        tensors |= {f"{folder}.{key}": value for key, value in network.state.tensors.items()}
        others |= {f"{folder}.{key}": value for key, value in network.state.others.items()}
    notes = (*high.plan.notes, *(note for note in low.plan.notes if note not in high.plan.notes))
    names = (*high.state.notes, *(note for note in low.state.notes if note not in high.state.notes))
    plan = replace(
        high.plan,
        config={**high.plan.config, "boundary": float(boundary)},
        leaves=tuple(leaves),
        notes=notes,
    )
    state = replace(high.state, label=label, tensors=tensors, others=others, notes=names)
    return Network(label, state, high.layout, plan)
