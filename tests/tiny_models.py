"""Tiny networks with random parameters, for tests of every room."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from qdit_jax.calibration.recording import observe_call
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.models import AutoencoderKL, DiT
from qdit_jax.quant import QTensor

CONFIG = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 5,
}


def random_params(model, seed=0, scale=0.2):
    """Returns parameters without the zeros of initialization, so that every input matters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example_inputs())["params"]
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32) for leaf in leaves]
    return jax.tree.unflatten(tree, drawn)


def tiny_checkpoint(**config):
    model = DiT(**{**CONFIG, **config})
    return Checkpoint(model, random_params(model))


# LLVM's optimizations would take most of the time of a tiny network's call.
@jax.jit(static_argnames=("model",), compiler_options={"xla_backend_optimization_level": 0})
def output(model, params, *inputs, **options):
    """Returns `model.apply`, compiled: one operation after the other takes ten times as long."""
    return model.apply({"params": params}, *inputs, **options)


def tiny_vae():
    model = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), jnp.float32), shapes
    )
    return Checkpoint(model, params)


def quantized_layers(params):
    """Returns the paths of the layers whose kernel is a `QTensor`."""
    flat = flatten_dict(params, sep="/")
    return {p.removesuffix("/kernel") for p, leaf in flat.items() if isinstance(leaf, QTensor)}


def layer_ranges(params, x, timestep, condition, *, model):
    """Returns `{layer: (low [K], high [K])}` of one call of the network."""
    found = observe_call(params, x, timestep, condition, model=model, hessians=None, num_tokens=0)
    paths = [name.removeprefix("low/") for name in found if name.startswith("low/")]
    return {path: (found[f"low/{path}"], found[f"high/{path}"]) for path in paths}
