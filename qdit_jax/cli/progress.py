"""Progress of every verb: a bar with the time left for each stage, on a terminal only."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from qdit_jax.types import Progress

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

    `tell` is what library functions take as `progress_fn`.  With `resumes`, the first count is what
    an earlier run has done: it counts, but not for the time left. A `silent` one
    shows neither bar nor lines.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        text: str | None = None,
        resumes: bool = False,
        silent: bool = False,
    ) -> None:
        self.shown = is_shown() and not silent
        self.silent = silent
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

    def tell(self, event: Progress) -> None:
        """Shows the news."""
        if event.total is not None:
            self.expect(event.total)
        if event.best is not None:
            self.note(best=f"{event.best:.5g}")
        if event.done or self.resumes:
            self.update(event.done)
        if event.text is not None and not self.silent:
            self.write(event.text)

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


class Stages:
    """A bar for every stage that is told of."""

    def __init__(self, unit: str) -> None:
        self.unit, self.stage = unit, ""
        self.bar: Bar | None = None

    def __enter__(self) -> Stages:
        return self

    def tell(self, event: Progress) -> None:
        """Shows the news, in a new bar where a stage begins."""
        if self.bar is None or event.stage not in (None, self.stage):
            self.close()
            self.stage = event.stage or ""
            self.bar = Bar(0, self.unit, self.stage)
        self.bar.tell(event)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the last stage's bar."""
        if self.bar is not None:
            self.bar.close()
