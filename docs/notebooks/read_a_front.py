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
# # Read a front
#
# A search measures many assignments of group sizes to layers. Its front says what a little more cost would buy.
# This page runs a very short search on the packaged model and reads what came out.

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt

import qdit_jax as qdit
from qdit_jax.allocation import Allocate, AllocationSettings, Rollouts
from qdit_jax.demo import PACKAGED

ckpt = PACKAGED["digits"].convert(Path(tempfile.mkdtemp()) / "digits")
found = qdit.search(
    ckpt,
    jax.random.key(0),
    budget="bitops=1.0x-g64",
    space={"group_sizes": (32, 64, 128)},
    strategy=Allocate(AllocationSettings(num_gate=6, num_estimates=1, num_rounds=1, per_round=4)),
    rollouts=Rollouts(num_steps=3, num_batches=2, batch_size=6, num_calibration=1),
)

# %% [markdown]
# ## Everything that was measured
#
# A dot is an assignment: its cost against the error of final samples. Squares are the same size in every layer.

# %%
rows = found.history["measured"]
figure, axes = plt.subplots(figsize=(6, 4))
axes.plot([row["cost"] for row in rows], [row["fitness"] for row in rows], ".", label="measured")
for choice, size in enumerate((32, 64, 128)):
    uniform = [row for row in rows if set(row["assignment"]) == {choice}]
    for row in uniform:
        axes.plot(row["cost"], row["fitness"], "s", color="C1")
        axes.annotate(f" {size}", (row["cost"], row["fitness"]))
axes.axvline(found.budget.limit, color="gray", linestyle="--", label="budget")
axes.set(xlabel="bit operations per sample", ylabel="error of final samples")
axes.legend()
figure

# %% [markdown]
# Three questions to ask of such a picture:
#
# 1. **Is the chosen one below the uniform one at the same cost?** If not, the search bought nothing.
# 2. **Is the front steep at the budget?** Then a little more cost buys much, and the budget is worth another
#    thought.
# 3. **How large is the scatter at one cost?** If random assignments are as good, the space is small and any of them
#    will do.

# %%
(uniform,) = (row for row in rows if set(row["assignment"]) == {1})
chosen = next(row for row in rows if row["assignment"] == found.history["assignment"])
print(f"uniform 64: error {uniform['fitness']:.4f} at cost {uniform['cost']:.4g}")
print(f"chosen:     error {chosen['fitness']:.4f} at cost {chosen['cost']:.4g}")

# %% [markdown]
# ## Can the predictions be believed?
#
# The search predicts an assignment's error as the sum of errors of single layers. The rank correlation says whether
# those sums rank assignments; below the threshold the search leans on measurements.

# %%
report = found.history["report"]
report["rank_correlation"], report["passed"]

# %% [markdown]
# ## Which layer got what

# %%
sizes = {layer.path: layer.spec.weight.group_size for layer in qdit.plan(ckpt.params, found.recipe)}
for path, size in list(sizes.items())[:8]:
    print(f"{size:4d}  {path}")

# %% [markdown]
# ## Use it
#
# The recipe goes into `quantize` with any method. Keep in mind what the search measured: rounding to the nearest. If
# `best` is to round, let the search choose transforms as well (`--transforms none smooth`).

# %%
small = qdit.quantize(ckpt, method="rtn", recipe=found.recipe)
small.recipe.name
