"""A reference file that is missing fails its test: none drops out unseen."""

from __future__ import annotations

import pytest
from golden_files import GOLDEN_FOLDERS, IN_SHARED_ALONE


def test_an_absent_file_fails(golden):
    for name in ("no_such_file.npz", "dit_A_q_w4a8_g99.npz"):
        with pytest.raises(pytest.fail.Exception, match=f"{name} is missing"):
            golden(name)


def test_files_kept_here_are_never_skipped(golden):
    kept = [path.name for path in GOLDEN_FOLDERS[0].iterdir()]
    assert len(kept) > 20
    for name in kept:
        assert golden(name).exists()
        assert not IN_SHARED_ALONE.fullmatch(name)
