"""The video transformers of Wan 2.1 and 2.2 (arXiv:2503.20314): one network, or two experts.

Layer names follow the authors' checkpoints; a list index becomes `_i`, and q, k, v that read the same
input are one layer.

Wan 2.2 A14B has two networks of one form, one for the timesteps from a boundary on (much noise) and
one for those below. Their parameters are the entries `high` and `low`, and a call runs those that a
sample of the batch needs: one of them, where all samples have the same timestep.

Dimensions: B batch, T frames, H and W rows and columns, C channels of the latents, N tokens, D width,
L rows of text, E width of the text, M moments of time: 1, or N where every token has its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from qdit_jax.kernels import GELU
from qdit_jax.models.layers import flat_xavier, timestep_features
from qdit_jax.models.linear import Layers
from qdit_jax.models.network import NetworkModule
from qdit_jax.models.rotary import grid_positions, rotary_angles
from qdit_jax.models.runs import apply_blocks
from qdit_jax.models.wan_blocks import NORMAL, Block, Head
from qdit_jax.types import Condition, Params

HIGH, LOW = EXPERTS = ("high", "low")  # the expert of much noise first


@dataclasses.dataclass(frozen=True)
class Form:
    """The sizes of one network; the fields are those of `Wan`."""

    patch_size: tuple[int, int, int]
    channels: int
    width: int
    depth: int
    num_heads: int
    ffn_width: int
    freq_width: int
    eps: float
    layers: Layers


class Expert(nn.Module):
    """Returns the velocity by one of two networks."""

    form: Form

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T H W C"], times: Num[Array, "B M"], text: Float[Array, "B L E"]
    ) -> Float[Array, "B T H W C"]:
        return velocity(self, self.form, x, times, text)


def velocity(
    module: nn.Module,
    form: Form,
    x: Float[Array, "B T H W C"],
    times: Num[Array, "B M"],
    text: Float[Array, "B L E"],
) -> Float[Array, "B T H W C"]:
    """Returns the velocity by one network; the layers belong to `module`, which calls."""
    d, layers = form.width, form.layers
    a, b, c = form.patch_size
    grid = tuple(n // p for n, p in zip(x.shape[1:4], form.patch_size, strict=True))
    patches = rearrange(x, "n (t a) (h b) (w c) z -> n (t h w) (a b c z)", a=a, b=b, c=c)
    shape = (*form.patch_size, form.channels, d)
    patch = layers.linear(d, flat_xavier, shape, wide_output=True, name="patch_embedding")
    tokens = patch(patches)  # [B, N, D]
    hidden = layers.linear(d, NORMAL, name="text_embedding_0").fused(text, GELU)
    text = layers.linear(d, NORMAL, name="text_embedding_2")(hidden)
    features = timestep_features(times, form.freq_width)
    hidden = nn.silu(layers.linear(d, NORMAL, name="time_embedding_0")(features))
    time = layers.linear(d, NORMAL, wide_output=True, name="time_embedding_2")(hidden)
    projection = layers.linear(6 * d, NORMAL, wide_output=True, name="time_projection_1")
    shared = rearrange(projection(nn.silu(time)), "n m (s d) -> n m s d", s=6)
    angles = rotary_angles(grid_positions(*grid), rope_axes(d // form.num_heads))
    make_fn = partial(Block, form.num_heads, form.ffn_width, form.eps, layers)
    tokens = apply_blocks(module, make_fn, "blocks", form.depth, tokens, shared, text, angles)
    out = Head(a * b * c * form.channels, form.eps, layers, name="head")(tokens, time)
    t, h, _ = grid
    return rearrange(out, "n (t h w) (a b c z) -> n (t a) (h b) (w c) z", t=t, h=h, a=a, b=b, c=c)


class Wan(NetworkModule):
    """A text-to-video transformer that predicts the velocity from the data to the noise.

    Attributes:
        sample_size: frames, rows and columns of the latents by default; a call may have others.
        patch_size: frames, rows and columns of a patch.
        hidden_size: D, of all heads together.
        freq_width: of the sinusoids of time.
        text_width, text_length: E, and the rows that every text is padded to with zeros.
        boundary: timestep from which on the expert `high` is run, and below which `low`; None for
            one network.
        expert: of two, the one that is run at all timesteps, by parameters that may hold it alone;
            no part of the stored configuration.
    """

    sample_size: tuple[int, int, int] = (21, 60, 104)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    hidden_size: int = 1536
    depth: int = 30
    num_heads: int = 12
    ffn_width: int = 8960
    freq_width: int = 256
    text_width: int = 4096
    text_length: int = 512
    eps: float = 1e-6
    boundary: float | None = None
    expert: str | None = None

    prediction = "velocity"
    velocity_to = "noise"
    flow_times = (1000.0, 0.0)
    learned_variance = False
    has_null = True
    guided_channels = None
    default_sampler = "unipc"
    scans_blocks = True

    def __post_init__(self) -> None:
        if self.expert is not None and (self.boundary is None or self.expert not in EXPERTS):
            raise ValueError(
                f"expert={self.expert!r} is not of this network; it has "
                f"{' and '.join(EXPERTS) if self.boundary is not None else 'none'}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T H W C"],
        timestep: Num[Array, "*moments"],
        condition: Mapping[str, Array],
    ) -> Float[Array, "B T H W C"]:
        """Returns the velocity, noise minus data.

        Args:
            timestep: 0 (data) to 1000 (noise), `[B]`, or `[B, N]` with one per token: frames, then
                rows, then columns of patches.
            condition: `text [B, L, E]`, and optionally `text_mask [B, L]`. As published, what the
                mask leaves out is set to zero, the text is padded with zeros to `text_length`, and
                all its rows are attended.

        Raises:
            ValueError: if x, the timesteps or the text do not fit the network.
        """
        self.check_call(x, timestep)
        text = self.padded_text(condition)
        times = timestep.astype(jnp.float32).reshape(len(x), -1)  # [B, M]
        if self.boundary is None:
            return velocity(self, self.form, x, times, text)
        if self.expert is not None:
            return Expert(self.form, name=self.expert)(x, times, text)
        return self.of_experts(x, times, text)

    def of_experts(
        self,
        x: Float[Array, "B T H W C"],
        times: Num[Array, "B M"],
        text: Float[Array, "B L E"],
    ) -> Float[Array, "B T H W C"]:
        """Returns every sample's velocity by the expert of its timestep; see `runs_all_experts`."""
        of_sample = self.expert_of(times)
        out = jnp.zeros(x.shape, jnp.float32)
        for number, name in enumerate(self.experts):
            mine = of_sample == number
            added = partial(with_expert, name)
            given = (out, mine.reshape(-1, *(1,) * (x.ndim - 1)), x, times, text)
            if self.is_initializing() or self.runs_all_experts():
                out = added(self, *given)
            else:
                out = nn.cond(mine.any(), added, unchanged, self, *given)
        return out

    def runs_all_experts(self) -> bool:
        """Returns whether all experts run at every timestep, and where their outputs are not needed.

        False, unless who watches the layers intercepts this method: what is seen inside a branch
        cannot leave it.
        """
        return False

    def seen_frames(
        self,
        x: Float[Array, "B T H W C"],
        timestep: Num[Array, " B"],
        condition: Condition,
        mask: Bool[Array, "B T"],
    ) -> tuple[Num[Array, "B N"], Condition]:
        """Returns a timestep per token, 0 for those of clean frames (`mask` False), and the condition.

        Wan 2.2 5B was trained with that; the other networks compute with it, but were not.
        """
        frames, rows, columns = self.patch_size
        by_patch = mask.reshape(len(mask), -1, frames).any(axis=-1)
        per_frame = (x.shape[2] // rows) * (x.shape[3] // columns)
        by_token = jnp.repeat(by_patch, per_frame, axis=1)
        return jnp.where(by_token, timestep[:, None], jnp.zeros((), timestep.dtype)), condition

    @property
    def form(self) -> Form:
        """Returns the sizes of one of its networks."""
        names = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "ffn_width")
        return Form(*(getattr(self, name) for name in (*names, "freq_width", "eps", "layers")))

    @property
    def experts(self) -> tuple[str, ...]:
        """Returns the names of the networks between which the timestep chooses; empty for one."""
        if self.boundary is None:
            return ()
        return EXPERTS if self.expert is None else (self.expert,)

    @property
    def default_guidance(self) -> float | tuple[float, float]:  # type: ignore[override]
        """Returns the published guidance, of two experts each one's."""
        if self.boundary is None:
            return 5.0
        pair = (4.0, 3.0)
        return pair if self.expert is None else pair[EXPERTS.index(self.expert)]

    @property
    def flow_shift(self) -> float:  # type: ignore[override]
        """Returns the published shift of text to video; image to video at 480 rows has 3."""
        return 5.0 if self.boundary is None else 12.0

    def expert_of(self, timestep: Num[Array, "B *moments"]) -> Array:
        """Returns the number in `experts` of each sample's network, `[B]`.

        Where tokens have timesteps of their own, the greatest counts: frames that are given and not
        denoised are at 0.
        """
        latest = timestep.reshape(len(timestep), -1).max(axis=1)
        return (latest < (self.boundary or 0.0)).astype(jnp.int32)

    def padded_text(self, condition: Mapping[str, Array]) -> Float[Array, "B L E"]:
        """Returns the text with `text_length` rows, zeros where there is none."""
        text = condition["text"]
        if text.ndim != 3 or text.shape[-1] != self.text_width or text.shape[1] > self.text_length:
            raise ValueError(
                f"text has shape {text.shape}; this model takes [B, L, {self.text_width}] with at "
                f"most {self.text_length} rows (text_length)."
            )
        mask = condition.get("text_mask")
        if mask is not None:
            text = jnp.where(mask[..., None], text, 0)
        return jnp.pad(text, ((0, 0), (0, self.text_length - text.shape[1]), (0, 0)))

    def check_call(self, x: Array, timestep: Array) -> None:
        """Raises `ValueError` if the latents or the timesteps do not fit the network."""
        if x.ndim != 5 or x.shape[-1] != self.in_channels:
            raise ValueError(
                f"x has shape {x.shape}; this model takes [B, T, H, W, {self.in_channels}]."
            )
        if any(n % p for n, p in zip(x.shape[1:4], self.patch_size, strict=True)):
            raise ValueError(
                f"x has {x.shape[1:4]} frames, rows and columns, which patches of {self.patch_size} "
                "do not divide."
            )
        tokens = math.prod(x.shape[1:4]) // math.prod(self.patch_size)
        if timestep.shape not in ((len(x),), (len(x), tokens)):
            raise ValueError(
                f"timestep has shape {timestep.shape}; give one per sample, or {tokens} of each, one "
                "per token."
            )
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} does not make num_heads={self.num_heads} of an even "
                "width."
            )

    def sample_shape(self) -> tuple[int, ...]:
        """Returns frames, rows, columns and channels of the latents."""
        return (*self.sample_size, self.in_channels)

    def example_condition(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns an abstract text of the full length."""
        shape = (batch, self.text_length, self.text_width)
        return {"text": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def null_condition(self, condition: Condition, params: Params) -> None:
        """Returns None: the published null is an encoded text, which the caller brings."""

    def check_condition(self, condition: Condition) -> None:
        """Raises `ValueError` for other entries than a text, and a mask that does not fit it."""
        names = set(condition) if isinstance(condition, Mapping) else None
        if names not in ({"text"}, {"text", "text_mask"}):
            given = type(condition).__name__ if names is None else sorted(names)
            raise ValueError(
                f"the condition is {given}; give a dict with text [B, L, {self.text_width}], and "
                "text_mask [B, L] where rows of it are padding."
            )
        assert isinstance(condition, Mapping)
        text, mask = (np.shape(condition.get(name, ())) for name in ("text", "text_mask"))
        if len(text) != 3 or text[2] != self.text_width or not 0 < text[1] <= self.text_length:
            raise ValueError(
                f"text has shape {text}; give [B, L, {self.text_width}] with L up to "
                f"{self.text_length}."
            )
        if "text_mask" in condition and mask != text[:2]:
            raise ValueError(f"text_mask has shape {mask}; give {text[:2]}, as text has.")


def with_expert(name: str, module: Wan, out: Array, chosen: Array, *inputs: Array) -> Array:
    """Returns `out` with the samples that are `chosen` by one expert."""
    return jnp.where(chosen, Expert(module.form, name=name)(*inputs), out)


def unchanged(module: Wan, out: Array, *inputs: Array) -> Array:
    """Returns what the experts before have made: none of the batch needs this one."""
    return out


def rope_axes(head_width: int) -> tuple[int, int, int]:
    """Returns the channels of a head that frames, rows and columns turn."""
    side = 2 * (head_width // 6)
    return head_width - 2 * side, side, side
