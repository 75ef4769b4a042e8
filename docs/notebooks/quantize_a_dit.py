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
# # Quantize a DiT in ten minutes
#
# A small diffusion transformer, which is inside the package, goes from float32 to 4-bit weights and 8-bit
# activations. It draws digits and was given outlier channels, as large DiTs have them. Every line is the same for
# DiT-XL/2; only the times differ.
#
# The settings are small, so that the page runs in under a minute on a CPU: figures that compare methods are on the
# page of results.

# %%
import tempfile
from pathlib import Path

import jax

import qdit_jax as qdit
from qdit_jax.demo import PACKAGED
from qdit_jax.metrics import signal_to_noise_db
from qdit_jax.report import image_grid

folder = Path(tempfile.mkdtemp())
ckpt = PACKAGED["digits"].convert(folder / "digits")
ckpt.model

# %% [markdown]
# A checkpoint is a network, its parameters and a recipe, which is None in full precision. How large is it?


# %%
def megabytes(checkpoint):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params)) / 1e6


f"{megabytes(ckpt):.2f} MB"

# %% [markdown]
# ## A plan, before anything is computed
#
# A recipe says which layer gets which bits. `plan` lists what it does to each layer.

# %%
recipe = qdit.Recipe.preset("w4a8", ckpt, group_size=0)
for layer in qdit.plan(ckpt.params, recipe)[:6]:
    print(f"{layer.path:20} {layer.shape} {layer.bytes_before:,} -> {layer.bytes_after:,} bytes")

# %% [markdown]
# ## Round to the nearest, and look at the price
#
# One scale for a whole channel and rounding to the nearest is the simplest there is. The same noise and labels go
# through both networks.

# %%
labels = list(range(10))
sampler = qdit.ddim(steps=10)
plain = qdit.quantize(ckpt, method="rtn", recipe=recipe)
full = qdit.generate(ckpt, sampler, labels, seed=0, guidance=1.5)
rounded = qdit.generate(plain, sampler, labels, seed=0, guidance=1.5)

# %%
image_grid([*full, *rounded], columns=10, scale=3)

# %% [markdown]
# The upper row is full precision. The lower one has lost digits: outlier channels stretch the range that all
# channels of a token share.
#
# ## The same bits, a better method
#
# `best` scales, shifts or rotates the input of each layer where that lowers the error of its output on held-out
# inputs, and then rounds by GPTQ. It samples those inputs from the checkpoint itself.

# %%
data = qdit.CalibrationData(num_samples=8, num_steps=4, holdout=0.25)
better = qdit.quantize(ckpt, method="best", recipe=recipe, data=data)
fitted = qdit.generate(better, sampler, labels, seed=0, guidance=1.5)
image_grid([*full, *rounded, *fitted], columns=10, scale=3)

# %% [markdown]
# ## How close, in decibels
#
# The ratio of signal to error of the samples: 20 dB is an error of a tenth.

# %%
for name, small, images in (("rtn", plain, rounded), ("best", better, fitted)):
    closeness = signal_to_noise_db(full, images).mean()
    print(f"{name}: {closeness:.1f} dB, {megabytes(small):.2f} MB of {megabytes(ckpt):.2f}")

# %% [markdown]
# `qdit.verify(better, against=ckpt)` says besides what became of every layer, and fails below limits that you set.
#
# ## Save, load
#
# A folder, or one file. It needs no other file afterwards.

# %%
qdit.save(folder / "digits-w4a8.safetensors", better)
again = qdit.load(folder / "digits-w4a8.safetensors")
assert again.recipe == better.recipe
f"{(folder / 'digits-w4a8.safetensors').stat().st_size / 1e6:.2f} MB"
