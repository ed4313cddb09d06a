"""Random numbers of a row: a pure function of (seed, row number).

From the raw output of PCG64, which NumPy promises not to change.
"""

from __future__ import annotations

import numpy as np

from switchable.data.arrays import Floats, Ints

STREAM = 0x6D61736B
"""Sets these numbers apart from those that order the windows, which come from the same seed."""


def uniforms(seed: int, rows_B: Ints, count: int) -> Floats:
    """Return `count` numbers in [0, 1) for each row: [B, count]."""
    raw = [
        np.random.PCG64(np.random.SeedSequence([seed, STREAM, int(row)])).random_raw(count) for row in rows_B
    ]
    return (np.stack(raw) >> np.uint64(11)).astype(np.float64) * 2.0**-53
