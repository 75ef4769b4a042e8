"""What was measured so far, in a JSON file: a stopped run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from qdit_jax.checkpoint import first_difference
from qdit_jax.errors import UserError
from qdit_jax.files import AnyPath, read_once, replaced_file

FILE = "bench.json"
FORMAT_VERSION = 1


class Records:
    """Measurements by name, saved after each one.

    Attributes:
        settings: all that determines them, the machine included; see `checkpoint.fingerprint`.
        entries: what was measured, in JSON's types.
        num_found: how many of these an earlier run had measured.
    """

    def __init__(self, folder: AnyPath | None, settings: Mapping[str, Any]) -> None:
        """Reads what an earlier run has left in `folder`; None keeps nothing.

        Raises:
            UserError: if the folder holds measurements of another machine or other settings.
        """
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.path = None if folder is None else folder / FILE
        self.entries: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self.entries = self.read(self.path)
        self.num_found = len(self.entries)

    def read(self, path: AnyPath) -> dict[str, Any]:
        """Returns the entries in a file."""
        try:
            saved = read_once(path.read_text())
            found, settings = dict(saved["entries"]), dict(saved["settings"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); remove it to start again."
            ) from error
        name = first_difference(settings, self.settings)
        if name is not None:
            raise UserError(
                f"{path} holds measurements of other settings: {name} was {settings.get(name)}, now "
                f"it is {self.settings.get(name)}; write to another folder, or pass --force."
            )
        return found

    def entry(self, name: str, measure_fn: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Returns a measurement, from the file or from `measure_fn`."""
        if name not in self.entries:
            self.entries[name] = json.loads(json.dumps(measure_fn()))
            self.save()
        return dict(self.entries[name])

    def save(self, **more: object) -> None:
        """Writes everything, with `more` beside it; a reader never sees half of it."""
        if self.path is None:
            return
        saved = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "entries": self.entries,
            **more,
        }
        with replaced_file(self.path) as temporary:
            temporary.write_text(json.dumps(saved, indent=1) + "\n")
