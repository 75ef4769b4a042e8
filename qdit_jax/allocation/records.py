"""What a search has measured, and how it is kept on disk so that a killed run loses nothing.

Dimensions: C assignments, L layers.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from qdit_jax.allocation.space import Space
from qdit_jax.errors import UserError
from qdit_jax.files import PathLike, as_path
from qdit_jax.types import Numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """Assignments in the order in which they were measured.

    Attributes:
        assignments: int32 `[C, L]`.
        fitness, cost: float64 `[C]`; lower is better.
        round: int32 `[C]`, the generation (or round) of each.
    """

    assignments: np.ndarray
    fitness: np.ndarray
    cost: np.ndarray
    round: np.ndarray

    @classmethod
    def none(cls, space: Space) -> Measured:
        """Returns the record of a search that has not begun."""
        empty = np.zeros(0)
        return cls(np.zeros((0, len(space.layers)), np.int32), empty, empty, empty.astype(np.int32))

    @property
    def num_rounds(self) -> int:
        """Returns how many generations are complete."""
        return int(self.round.max(initial=-1)) + 1

    @property
    def order(self) -> np.ndarray:
        """Returns the numbers of the assignments, best first; the earlier wins a tie."""
        return np.argsort(self.fitness, kind="stable")

    @property
    def best(self) -> np.ndarray:
        """Returns the best assignment, `[L]`."""
        return self.assignments[self.order[0]]

    @property
    def known(self) -> set[bytes]:
        """Returns the assignments as bytes, to look up whether one was measured."""
        return {assignment.tobytes() for assignment in self.assignments}

    def extended(self, assignments: np.ndarray, fitness: Numbers, cost: Numbers) -> Measured:
        """Returns this record with one more round."""
        number = np.full(len(assignments), self.num_rounds, np.int32)
        new = (np.asarray(assignments, np.int32), fitness, cost, number)
        old = (self.assignments, self.fitness, self.cost, self.round)
        return Measured(*(np.concatenate(pair) for pair in zip(old, new, strict=True)))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays by name."""
        return dataclasses.asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """Returns one JSON-able object per assignment."""
        return [
            {"round": int(r), "fitness": float(f), "cost": float(c), "assignment": a.tolist()}
            for a, f, c, r in zip(
                self.assignments, self.fitness, self.cost, self.round, strict=True
            )
        ]


class Store:
    """Named states of one search in a folder; the last two are kept (Orbax).

    All processes of a distributed search call `save` and `load`; Orbax writes from the first one.
    A folder written under other settings is refused; the folder appears with the first state.
    """

    def __init__(self, folder: PathLike, settings: dict[str, Any]) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what its threads log is raised too
        self.settings = json.loads(json.dumps(settings))
        self.folder = as_path(folder)
        self.opened: ocp.CheckpointManager | None = None

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # With other processes, closing waits for them; one that is lost never comes.
        if self.opened is not None and (kind is None or jax.process_count() == 1):
            self.opened.close()

    @property
    def manager(self) -> ocp.CheckpointManager:
        """Returns Orbax's manager, which makes the folder."""
        if self.opened is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            self.opened = ocp.CheckpointManager(self.folder.resolve(), options=options)
        return self.opened

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        """Writes `arrays` as the newest state; a reader never sees half of one."""
        step = (self.manager.latest_step() or 0) + 1
        self.manager.save(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), settings=ocp.args.JsonSave(self.settings)
            ),
        )

    def load(self) -> dict[str, np.ndarray] | None:
        """Returns the newest state, or None.

        Raises:
            UserError: if the folder holds another search, or cannot be read.
        """
        step = self.manager.latest_step() if self.folder.is_dir() else None
        if step is None:
            return None
        try:
            found = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore(), settings=ocp.args.JsonRestore()
                ),
            )
        except jax.errors.JaxRuntimeError:  # another process is lost: the state is not to blame
            raise
        except Exception as error:  # Orbax and its storage layer raise many kinds.
            raise UserError(
                f"the state in {self.folder} cannot be read ({error}); remove it to start again."
            ) from error
        self.check_settings(found["settings"])
        return {name: np.asarray(array) for name, array in found["arrays"].items()}

    def check_settings(self, saved: dict[str, Any]) -> None:
        """Raises `UserError` naming the first setting in which the saved search differs."""
        for name in sorted(set(saved) | set(self.settings)):
            if saved.get(name) != self.settings.get(name):
                old, new = (str(s.get(name))[:80] for s in (saved, self.settings))
                raise UserError(
                    f"{self.folder} holds the state of another search: {name} was {old}, now it "
                    f"is {new}; remove it, or write to another folder."
                )
