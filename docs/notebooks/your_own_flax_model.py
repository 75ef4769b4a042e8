# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own Flax model
#
# Layers of a network that this library did not build can be quantized as they stand, in `flax.linen` and in
# `flax.nnx`. Its code stays as it is.

# %%
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import qdit_jax as qdit


def error_db(out, reference):
    """Returns the ratio of signal to error in decibels."""
    return float(10 * jnp.log10(jnp.mean(reference**2) / jnp.mean((out - reference) ** 2)))


# %% [markdown]
# ## Linen
#
# A small transformer block with a layer that Flax brings along.


# %%
class Block(nn.Module):
    width: int = 128

    @nn.compact
    def __call__(self, x):
        mixed = nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        x = x + mixed
        hidden = nn.gelu(nn.Dense(4 * self.width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width, name="down")(hidden)


net = Block()
x = jax.random.normal(jax.random.key(0), (2, 16, 128))
variables = net.init(jax.random.key(1), x)

# %% [markdown]
# The recipe names layers by their paths. `example_args` lets all layers be met now rather than at the first call;
# the report says what was quantized, and what stayed, and why.

# %%
recipe = qdit.Recipe.preset("w4a8", layers="up|down|attention/.*", group_size=32)
apply_fn, small = qdit.quantize_linen(net, variables, recipe, example_args=(x,))
print(apply_fn.report)
print(f"{error_db(apply_fn(small, x), net.apply(variables, x)):.1f} dB")

# %% [markdown]
# `apply_fn` is a function like `net.apply`: jit it, differentiate with respect to `x`, map it.

# %%
fast = jax.jit(apply_fn)
fast(small, x).shape

# %% [markdown]
# More bits where it hurts: a recipe is a list of rules, and the last one that matches decides.

# %%
more = qdit.Rule(
    "down",
    qdit.LayerSpec(qdit.WeightSpec(bits=8, group_size=32), qdit.ActSpec(bits=8, group_size=32)),
)
mixed = qdit.Recipe((*recipe.rules, more), name="mixed")
apply_fn, small = qdit.quantize_linen(net, variables, mixed, example_args=(x,))
print(f"{error_db(apply_fn(small, x), net.apply(variables, x)):.1f} dB")

# %% [markdown]
# ## NNX
#
# A network of `flax.nnx` comes back as a network of the same class.


# %%
class Body(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(128, 512, rngs=rngs)
        self.down = nnx.Linear(512, 128, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


body = Body(nnx.Rngs(0))
recipe = qdit.Recipe.preset("w4a8", layers="up|down", group_size=32)
quantized = qdit.quantize_nnx(body, recipe, strict=True, report_fn=print)
print(f"{error_db(quantized(x), body(x)):.1f} dB")

# %% [markdown]
# ## One array
#
# What all of this rests on: an array as packed codes with a scale per group.

# %%
kernel = body.up.kernel[...]
for bits in (8, 6, 4, 3):
    q = qdit.quantize_array(kernel, qdit.WeightSpec(bits=bits, group_size=32))
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(q))
    print(
        f"{bits} bits: {error_db(qdit.dequantize(q), kernel):5.1f} dB, {stored:,} of {kernel.nbytes:,} bytes"
    )
