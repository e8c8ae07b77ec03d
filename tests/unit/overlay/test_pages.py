from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cloudlet.overlay.pages import equal_rows, numbers_of, runs_of, zero_rows


@given(st.sets(st.integers(0, 2**32 - 1) | st.integers(0, 40), max_size=60))
def test_runs_and_numbers_are_inverse(members: set[int]) -> None:
    numbers = np.array(sorted(members), np.uint32)
    runs = runs_of(numbers)
    assert numbers_of(runs).tolist() == numbers.tolist()
    ends = runs.astype(np.int64).sum(axis=1)
    assert (runs[1:, 0] > ends[:-1]).all(), "runs touch"


def test_rows_are_compared_to_the_last_byte() -> None:
    one, other = np.zeros((3, 4096), np.uint8), np.zeros((3, 4096), np.uint8)
    other[1, 4095] = 1
    other[2, 0] = 1
    assert equal_rows(one, other).tolist() == [True, False, False]
    assert zero_rows(other).tolist() == [True, False, False]
