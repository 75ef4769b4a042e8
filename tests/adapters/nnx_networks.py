"""Small NNX networks, written as other people write theirs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

D = 16


class Twice(nnx.Linear):
    """Derives from a layer and computes something else."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.up = nnx.Linear(D, 2 * D, rngs=rngs)
        self.down = nnx.Einsum("bti,io->bto", (2 * D, D), (D,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class Zoo(nnx.Module):
    """Layers of every kind, in every place where they may hang."""

    def __init__(self, rngs):
        shared = nnx.Linear(D, D, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs), Block(rngs=rngs)])
        self.head = nnx.Sequential(nnx.Linear(D, D, use_bias=False, rngs=rngs), nnx.silu)
        self.named = nnx.Dict(first=shared, again=shared)
        self.tuned = nnx.LoRA(D, 2, D, base_module=nnx.Linear(D, D, rngs=rngs), rngs=rngs)
        self.lora = nnx.LoRALinear(D, D, lora_rank=2, rngs=rngs)
        self.lora.lora.lora_b[...] = 0.1 * jax.random.normal(rngs.params(), (2, D))
        self.tuned.lora_b[...] = 0.1 * jax.random.normal(rngs.params(), (2, D))
        self.batched = nnx.LinearGeneral(D, (2, 3), batch_axis={0: 2}, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.named.again(nnx.relu(self.named.first(self.head(x))))
        return self.batched(self.lora(self.tuned(x)))


class Odd(nnx.Module):
    """One layer that can be quantized, and every kind that cannot."""

    def __init__(self, rngs):
        self.good = nnx.Linear(D, D, rngs=rngs)
        self.twice = Twice(D, D, rngs=rngs)
        self.conv = nnx.Conv(D, D, 3, rngs=rngs)
        self.table = nnx.Embed(5, D, rngs=rngs)
        self.own = nnx.Linear(D, D, dot_general=lambda *a, **k: jax.lax.dot_general(*a), rngs=rngs)
        self.normed = nnx.WeightNorm(nnx.Linear(D, D, rngs=rngs), rngs=rngs)
        self.one = nnx.Linear(D, D, rngs=rngs)
        self.tied = nnx.Linear(D, D, rngs=rngs)
        self.tied.kernel = self.one.kernel
        self.free = nnx.Param(jnp.ones((D, D)))


class WanAttention(nnx.Module):
    """Attention as in video transformers for TPUs, with norms over the whole width."""

    def __init__(self, rngs):
        self.query = nnx.Linear(D, D, rngs=rngs)
        self.key = nnx.Linear(D, D, rngs=rngs)
        self.value = nnx.Linear(D, D, rngs=rngs)
        self.proj_attn = nnx.Linear(D, D, rngs=rngs)
        self.norm_q = nnx.RMSNorm(D, rngs=rngs)
        self.norm_k = nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, x, text):
        q, k, v = (
            self.norm_q(self.query(x)),
            self.norm_k(self.key(text)),
            self.value(text),
        )
        weights = nnx.softmax(jnp.einsum("bqd,bkd->bqk", q, k) / D**0.5)
        return self.proj_attn(jnp.einsum("bqk,bkd->bqd", weights, v))


class WanBlock(nnx.Module):
    def __init__(self, rngs):
        self.attn1, self.attn2 = WanAttention(rngs), WanAttention(rngs)
        self.ffn = nnx.Sequential(
            nnx.Linear(D, 3 * D, rngs=rngs), nnx.gelu, nnx.Linear(3 * D, D, rngs=rngs)
        )
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (1, 6, D)) / D)

    def __call__(self, x, time, text):
        modulation = time + self.scale_shift_table[...]
        shift, scale, gate = (modulation[:, i : i + 1] for i in range(3))
        normed = x * (1 + scale) + shift
        x = x + gate * self.attn1(normed, normed)
        x = x + self.attn2(x, text)
        return x + self.ffn(x)


class WanLike(nnx.Module):
    """Blocks stacked by `nnx.vmap`, scanned over and rematerialized."""

    def __init__(self, rngs, depth=3):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return WanBlock(rngs)

        self.blocks = stacked(rngs)
        self.proj_out = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x, time, text):
        @nnx.remat
        def once(x, block):
            return block(x, time, text)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def scanned(x, block):
            return once(x, block)

        return self.proj_out(scanned(x, self.blocks))
