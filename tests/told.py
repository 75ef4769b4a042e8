"""What a `progress_fn` was told."""

from __future__ import annotations

from qdit_jax.types import Progress


class Told(list):
    """All news so far; `tell` is a `progress_fn`."""

    def tell(self, event):
        assert isinstance(event, Progress)
        self.append(event)

    def of(self, name):
        """Returns one field of all events that have news of it."""
        found = (getattr(event, name) for event in self)
        return [value for value in found if value not in (None, 0)]

    @property
    def counts(self):
        return self.of("done")

    @property
    def texts(self):
        return self.of("text")

    @property
    def layers(self):
        return self.of("layer")

    @property
    def total(self):
        return self.of("total")[-1]
