"""What a method is: a row of the table, made of parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qdit_jax.checkpoint import Checkpoint
from qdit_jax.methods.choosing import ChooseTransforms
from qdit_jax.methods.data import CalibrationData
from qdit_jax.methods.fitting import fit_rounding
from qdit_jax.methods.reconstruction import reconstruct_blocks
from qdit_jax.methods.static_ranges import static_ranges
from qdit_jax.quant import ranges
from qdit_jax.recipes import LayerSpec, Recipe
from qdit_jax.types import Params

# `(params, *, model, recipe, data, report) -> params`; `data` holds what the method needs.
ApplyFn = Callable[..., Params]
# `(params, *, model, recipe, data, report) -> (params, data)`: parameters in full precision that
# compute the same function, and what the following steps learn from.
PrepareFn = Callable[..., tuple[Params, CalibrationData]]
# `(checkpoint, data)` -> one field of `data`, from the checkpoint's own trajectories.
CollectFn = Callable[[Checkpoint, CalibrationData], Any]
# `(specs by path, data)`: raises `ValueError` if they do not suit the method.
CheckFn = Callable[[Mapping[str, LayerSpec], CalibrationData], None]
# `(source, out, *, recipe, stats, on_layer, overwrite, metadata) -> Checkpoint`, from disk to disk.
StreamFn = Callable[..., Checkpoint]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to quantize a network.

    Attributes:
        name: as `quantize(method=...)` and `--method` take it.
        paper: title and arXiv number of its source; empty if there is none.
        idea: one sentence.
        runtime_cost: a sentence on what the quantized network does in addition.
        hardware: a sentence on the number formats that its fast execution needs.
        apply: returns the quantized parameters.
        prepare: what is done before that, one step after another: exact input transforms, and
            statistics that are taken of the network so changed.
        needs: fields of `CalibrationData` that must be there, such as `"items"`, and what collects
            each where the caller has not brought it; None if the caller must.
        check: refuses a recipe or data before anything is computed.
        stream: does the same layer by layer from disk to disk, where the method can.
        settings: those of `Recipe.preset` that differ from its defaults, where a recipe is asked for
            by a preset's name.
    """

    name: str
    paper: str
    idea: str
    runtime_cost: str
    apply: ApplyFn
    prepare: tuple[PrepareFn, ...] = ()
    needs: Mapping[str, CollectFn | None] = dataclasses.field(default_factory=dict)
    hardware: str = "Integer dots of 8 or 4 bits, a scale per group."
    check: CheckFn | None = None
    stream: StreamFn | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def takes_own_ranges(self) -> bool:
        """Whether static activations get their ranges from the method's own inputs."""
        return static_ranges in self.prepare

    @property
    def learns_blocks(self) -> bool:
        """Whether rounding is learned over whole blocks, for one format of the weights."""
        return self.apply is reconstruct_blocks

    @property
    def weighs_timesteps(self) -> bool:
        """Whether it rounds by Hessians, in which inputs may count more or less by their timestep."""
        return getattr(self.apply, "func", self.apply) is fit_rounding

    @property
    def rounds_integers(self) -> bool:
        """Whether its rounding is learned, for codes that are whole numbers."""
        return self.weighs_timesteps or self.learns_blocks

    @property
    def makes_transforms(self) -> bool:
        """Whether it makes the transforms and branches that a recipe asks for."""
        return any(isinstance(step, ChooseTransforms) for step in self.prepare)

    def preset(self, name: str, params: Any = None, **options: Any) -> Recipe:
        """Returns `Recipe.preset(name, params, ...)` with this method's settings unless given."""
        return Recipe.preset(name, params, **{**self.settings, **options})

    def to_json(self) -> dict[str, Any]:
        """Returns the description as JSON-able values."""
        return {
            "name": self.name,
            "paper": self.paper,
            "idea": self.idea,
            "needs": list(self.needs),
            "runtime_cost": self.runtime_cost,
            "hardware": self.hardware,
            "settings": {
                name: value.to_json() if isinstance(value, ranges.RangeRule) else value
                for name, value in self.settings.items()
            },
        }
