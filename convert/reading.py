"""A network's values read by its plan: all at once, or one leaf at a time while they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from qdit_convert.kernels import recipe_of
from qdit_convert.layout import Layout
from qdit_convert.opened import Network
from qdit_convert.plan import Leaf, Params, build_params
from qdit_convert.quantized import formats_of, quantized_leaves
from qdit_convert.streaming import deferred_params
from qdit_convert.tensors import StateDict, about
from qdit_convert.wrappers import RAW
from qdit_jax.errors import UserError
from qdit_jax.types import Progress, ProgressFn

if TYPE_CHECKING:
    from qdit_jax.checkpoint import Checkpoint

# (network, called after each leaf) -> its parameters.
ParamsFn: TypeAlias = Callable[[Network, Callable[[Leaf], None]], Params]


class ReadModel(NamedTuple):
    """A network read from PyTorch weights: the content of a `Checkpoint`."""

    family: str
    config: dict[str, Any]
    params: Params
    metadata: dict[str, Any]
    vae: ReadModel | None = None


def read_network(network: Network, params_fn: ParamsFn, progress_fn: ProgressFn) -> ReadModel:
    """Returns a network with the parameters that `params_fn` makes of its plan."""
    plan, total = network.plan, len(network.plan.leaves)

    def on_leaf(leaf: Leaf) -> None:
        progress_fn(Progress(1, total=total, stage=f"reading {plan.family}"))

    params = params_fn(network, on_leaf)
    metadata: dict[str, Any] = {
        "source": Path(network.label).name,
        "layout": network.layout.title,
        "weights": network.state.weights,
        "source_family": network.layout.families[0],
    }
    if network.state.notes:
        metadata["names"] = list(network.state.notes)
    if plan.notes:
        metadata["notes"] = list(plan.notes)
    found = formats_of(plan, network.state.tensors)
    if found:
        metadata["quantized"] = found
    return ReadModel(plan.family, plan.config, params, metadata)


def at_once(dtype: np.dtype | None, place: Callable[[np.ndarray], Any]) -> ParamsFn:
    """Returns a function that reads all parameters; `place` is called with each as soon as it is read."""

    def params_fn(network: Network, on_leaf: Callable[[Leaf], None]) -> Params:
        tensors = network.state.tensors
        with named(network):
            return build_params(network.plan, tensors, dtype, on_leaf, place, quantized_leaves)

    return params_fn


def when_used(dtype: np.dtype | None) -> ParamsFn:
    """Returns a function that gives lazy arrays, read from the file whenever they are used."""

    def params_fn(network: Network, on_leaf: Callable[[Leaf], None]) -> Params:
        with named(network):
            return deferred_params(
                network.plan,
                network.state.tensors,
                dtype,
                on_leaf,
                lambda: named(network),
                quantized_leaves,
            )

    return params_fn


@contextmanager
def named(network: Network) -> Iterator[None]:
    """Has errors of reading values say the file and its own names."""
    renamed = in_own_names(network.layout, network.state)
    with about(network.label), suggesting_raw(network.state), renamed:
        try:
            yield
        except OSError as error:
            raise UserError(f"{error.strerror or error}.") from None


@contextmanager
def suggesting_raw(state: StateDict) -> Iterator[None]:
    """Adds to errors about averaged weights that the file holds the raw ones too."""
    try:
        yield
    except UserError as error:
        if not state.raw or RAW in str(error):
            raise
        raise UserError(f"{str(error).removesuffix('.')} (in the averaged weights{RAW}).") from None


@contextmanager
def in_own_names(layout: Layout, state: StateDict) -> Iterator[None]:
    """Has errors name the tensors as the file does, not as they were renamed."""
    try:
        yield
    except UserError as error:
        raise UserError(layout.own_names(str(error), state)) from None


def to_checkpoint(read: ReadModel) -> Checkpoint:
    """Returns the checkpoint of a network that was read, with its VAE."""
    from flax.traverse_util import flatten_dict

    from qdit_jax.checkpoint import Checkpoint
    from qdit_jax.models import build_model

    formats = read.metadata.get("quantized", ())
    return Checkpoint(
        model=build_model(read.family, read.config),
        params=read.params,
        recipe=recipe_of(flatten_dict(read.params, sep="/"), "+".join(formats)),
        metadata=read.metadata,
        vae=None if read.vae is None else to_checkpoint(read.vae),
    )
