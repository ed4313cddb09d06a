"""The Triton backend. `path.py` is its seam and imports without triton; every other module here needs triton."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
"""Whether Triton's interpreter runs the kernels, on the CPU. It must be chosen before triton is imported."""
