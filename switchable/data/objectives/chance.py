"""Random numbers of a row: a pure function of (seed, row number).

From the raw output of PCG64, which NumPy promises not to change.
"""

from __future__ import annotations

import numpy as np

from switchable.arrays import Floats, Ints

STREAM = 0x6D61736B
"""Sets these numbers apart from those that order the windows, which come from the same seed."""


def uniforms(seed: int, rows_B: Ints, count: int) -> Floats:
    """Return `count` numbers in [0, 1) for each row: [B, count]."""
    seeds = (np.random.SeedSequence([seed, STREAM, int(row)]) for row in rows_B)
    raw = [np.random.PCG64(each).random_raw(count) for each in seeds]
    return (np.stack(raw) >> np.uint64(11)).astype(np.float64) * 2.0**-53
