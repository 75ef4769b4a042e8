"""Checks that every room shares: counts, numbers, patterns."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from qdit_jax.errors import UserError, check_counts, check_finite, check_pattern


def test_counts_name_the_first_that_is_wrong():
    check_counts(a=1, b=np.int64(3))
    check_counts(0, a=0)
    for value in (0, -3, np.int32(0)):
        with pytest.raises(
            ValueError, match=f"^b={value} is not supported; use a whole number of 1"
        ):
            check_counts(a=1, b=value)
    for value in (1.5, "2", None):
        with pytest.raises(TypeError, match=r"^steps=.* is not supported; use a whole number"):
            check_counts(steps=value)


def test_numbers_are_finite_and_arrays_pass():
    check_finite(a=1, b=None, c=np.array(np.nan))
    for value in (float("nan"), float("inf"), np.float64("-inf")):
        with pytest.raises(ValueError, match=r"guidance=.* is not supported; use a finite number"):
            check_finite(guidance=value)


def test_patterns_name_the_argument_and_what_re_says():
    check_pattern("layers", r"blocks_\d+/.*")
    with pytest.raises(ValueError, match=r"hessians='\(' is not a regular expression: missing \)"):
        check_pattern("hessians", "(")
    with pytest.raises(TypeError, match="layers=3 is not supported; use a regular expression"):
        check_pattern("layers", 3)


def test_a_message_is_one_line_whatever_a_file_calls_its_parts():
    error = UserError("the storage model/data/\n\x00\u2028 is missing from é.pt.")
    assert str(error) == "the storage model/data/\\n\\x00\\u2028 is missing from é.pt."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
