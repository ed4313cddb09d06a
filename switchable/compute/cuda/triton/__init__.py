"""The Triton backend. `path.py` can be imported without triton; all other modules here need it."""

from switchable.compute.cuda.triton.path import TRITON as TRITON
