"""Progress of every verb: a bar with the time left for each stage, on a terminal only."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def notes_are_shown() -> bool:
    """Returns whether notes are printed: not with --quiet."""
    return logging.getLogger("qdit_jax").isEnabledFor(logging.INFO)


def is_shown() -> bool:
    """Returns whether bars are drawn: on a terminal, and not with --quiet."""
    return sys.stderr.isatty() and notes_are_shown()


class Bar:
    """A bar that appears at its first update, so that no empty one precedes an error.

    `update(count)` is what library functions take as `progress_fn`.  With `resumes`, the first
    count is what an earlier run has done: it counts, but not for the time left.
    """

    def __init__(
        self, total: int, unit: str, text: str | None = None, resumes: bool = False
    ) -> None:
        self.shown = is_shown()
        self.settings: dict[str, Any] = {
            "total": total,
            "unit": unit,
            "desc": text,
            "file": sys.stderr,
        }
        self.resumes = resumes
        self.began = time.time()
        self.bar: tqdm | None = None

    def __enter__(self) -> Bar:
        return self

    def update(self, count: int) -> None:
        """Adds to what is done."""
        if not self.shown:
            return
        if self.bar is None:
            from tqdm import tqdm

            done = count if self.resumes else 0
            self.bar = tqdm(initial=done, **self.settings)
            self.bar.start_t = self.began
            count -= done
        self.bar.total = max(self.bar.total, self.bar.n + count)
        self.bar.update(count)

    def expect(self, total: int) -> None:
        """Changes how much there is to do."""
        self.settings["total"] = total
        if self.bar is not None:
            self.bar.total = total

    def note(self, **values: str) -> None:
        """Shows values behind the bar."""
        self.settings["postfix"] = values
        if self.bar is not None:
            self.bar.set_postfix(values, refresh=False)

    def write(self, text: str) -> None:
        """Prints a line of results above the bar."""
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar, if it ever appeared."""
        if self.bar is not None:
            self.bar.close()
