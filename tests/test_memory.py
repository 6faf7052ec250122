"""How much memory the benchmarks say that a function takes."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory import peak_growth


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_the_peak_is_in_mebibytes_and_above_what_was_there_before():
    def fill():
        return np.ones(64 * 2**20, np.uint8).sum()

    there = np.ones(32 * 2**20, np.uint8)
    for _ in range(2):  # a second time nothing is left of the first
        grown, answer = peak_growth(fill)
        assert 60 < grown < 80
        assert answer == 64 * 2**20
    assert there.all()
