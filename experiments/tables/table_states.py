"""The models that the table of methods is made of: the packaged ones, their states, or yours."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qdit_jax as qdit
from qdit_jax.checkpoint import Checkpoint
from qdit_jax.demo import PACKAGED
from qdit_jax.evaluation import with_autoencoder
from qdit_jax.sampling import read_conditions

HERE = Path(__file__).resolve().parent
DIGITS = ("as_trained", "injected", "finetuned", "mixed")
OTHERS = tuple(name for name in PACKAGED if name != "digits")
STATES = (*DIGITS, *OTHERS)


@dataclasses.dataclass(frozen=True)
class State:
    """A model in one state.

    Attributes:
        conditions: what its samples are conditioned on; None for all classes.
        scored: whether the network of features knows its pictures.
        vae: the folder of an autoencoder, for a checkpoint without one.
    """

    path: Path
    conditions: Any = None
    scored: bool = True
    vae: str | None = None

    def read(self) -> Checkpoint:
        """Returns the checkpoint in a folder, or in weights of the packaged digit model's layout."""
        if self.path.is_dir():
            return with_autoencoder(qdit.load(self.path), self.vae)
        import qdit_convert

        return qdit_convert.convert(self.path, **PACKAGED["digits"].options)


def states_of(args: argparse.Namespace) -> dict[str, State]:
    """Returns the chosen states by name: the given checkpoints, else packaged ones."""
    given = [text.partition("=") for text in args.checkpoint or ()]
    if given:
        conditions = None if args.embeds is None else read_conditions(args.embeds).condition
        return {name: State(Path(path), conditions, vae=args.vae) for name, _, path in given}
    folder = args.out / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    built = {name: State(path) for name, path in digit_states(folder, args.states)}
    built |= {name: packaged(name, folder) for name in args.states if name in OTHERS}
    return {name: built[name] for name in args.states}


def packaged(name: str, folder: Path) -> State:
    """Returns another packaged model, converted where it is not there yet."""
    model = PACKAGED[name]
    if not (folder / name).exists():
        model.convert(folder / name)
    return State(folder / name, model.conditions(), model.scored)


def digit_states(folder: Path, chosen: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Yields the packaged digit model's states, built where they are not there yet."""
    if not set(chosen) & set(DIGITS):
        return
    sys.path.insert(0, str(HERE.parent / "testbeds"))
    import inject_outliers
    import mix_outliers

    trained = HERE.parent / "weights/demo_as_trained.safetensors"
    weights = Path(qdit.__file__).parent / "assets" / PACKAGED["digits"].weights
    heads = ["--num-heads", str(PACKAGED["digits"].options["num_heads"])]
    injected, mixed = (folder / f"{name}.safetensors" for name in ("injected", "mixed"))
    if not injected.exists():
        inject_outliers.main([str(trained), str(injected), *heads])
    if not mixed.exists():
        mix_outliers.main([str(weights), str(mixed), *heads])
    yield from zip(DIGITS, (trained, injected, weights, mixed), strict=True)
