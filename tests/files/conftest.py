"""A bucket that lives in memory."""

from __future__ import annotations

import pytest
from fake_bucket import fake_bucket


@pytest.fixture
def bucket():
    with fake_bucket() as found:
        yield found
