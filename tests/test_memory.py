"""How much memory the benchmarks say that a function takes."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.memory import peak_growth


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell")
def test_the_peak_is_in_mebibytes_and_above_what_was_there_before():
    there = np.ones(32 * 2**20, np.uint8)
    for mebibytes in (256, 128):  # of the first nothing is left
        grown, answer = peak_growth(lambda size=mebibytes: np.ones(size * 2**20, np.uint8).sum())
        assert grown == pytest.approx(mebibytes, rel=0.02)
        assert answer == mebibytes * 2**20
    assert there.all()
