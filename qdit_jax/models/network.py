"""What every network that denoises derives from.

Dimensions: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, cast

from flax import linen as nn

from qdit_jax.models.family import Network, example_inputs
from qdit_jax.models.linear import Layers, check_dtype
from qdit_jax.types import Condition

Guidances: TypeAlias = float | tuple[float, float]


class NetworkModule(nn.Module, kw_only=True):
    """A network with linear layers: how it runs is not part of the configuration it stores.

    Attributes:
        numerics: what quantized layers compute, `"simulated"` or `"integer"`.
        implementation: who computes them, a name in `kernels.IMPLEMENTATIONS`; None: what fits.
        dtype: of products of full-precision operands, one of `DTYPES`. Norms, softmax, modulation,
            time features, scales and what the network returns are float32 in both.

    A class says, where it differs from these:

    Attributes:
        default_guidance: the scale that it was published with; of two experts, a pair: that of the
            timesteps from `boundary` on, and that of those below.
        latents_only: why no autoencoder of this package decodes its samples, one sentence.

    A class that predicts a velocity says of it, where it differs from these:

    Attributes:
        flow_times: the timestep that it is called with at pure noise, and at the data.
        velocity_to: where the velocity points, `"data"` or `"noise"`.
        flow_shift: of the noise levels of its published sampler: a number, `"tokens"` (by
            `num_tokens`, as FLUX), `"tokens and steps"` (FLUX.2) or `"resolution"` (by
            `resolution_of`, as Open-Sora v1.2). A scheduler that comes with a checkpoint goes before it.
        flow_spacing: how its published pipeline spaces them before the shift, a name of
            `diffusion.flow_match_sigmas`; None for as the sampler or the scheduler does.
    """

    numerics: str = "simulated"
    implementation: str | None = None
    dtype: str = "float32"

    # Whether it applies its blocks by `apply_blocks` or `apply_periods`.
    scans_blocks: ClassVar[bool] = False
    default_guidance: ClassVar[Guidances] = 1.5
    latents_only: ClassVar[str | None] = None
    flow_times: ClassVar[tuple[float, float]] = (0.0, 1.0)
    velocity_to: ClassVar[str] = "data"
    flow_shift: ClassVar[float | str] = 1.0
    flow_spacing: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        super().__post_init__()

    @property
    def layers(self) -> Layers:
        """What the parts of the network are built with."""
        return Layers(self.numerics, self.implementation, self.dtype)

    def block_periods(self) -> Sequence[tuple[str, ...]] | None:
        """Returns the names of the blocks of each period that may be in a run; see `with_runs`.

        None of a network that applies its blocks by `apply_blocks`. One whose blocks differ in turn
        says it, and applies them by `apply_periods`; what it leaves out is never in a run.
        """
        return None

    def num_tokens(self, shape: tuple[int, ...]) -> int | None:
        """Returns the tokens of a sample of `shape`, channels last; None if that is not said."""
        return None

    def resolution_of(self, shape: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Returns rows and columns in pixels, and frames, of a sample; None if that is not said."""
        return None

    def all_conditions(self) -> Condition | None:
        """Returns None: prompts cannot be listed; a network of classes lists them."""
        return None

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """Returns abstract arguments of a call, to trace the network with."""
        return example_inputs(cast(Network, self), batch)
