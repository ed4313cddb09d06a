"""Which of the processor's instruction sets our loops may use: those that it has, up to a limit, if the system agrees.

`ONEDNN_MAX_CPU_ISA` limits torch's own products; ours keep to it too.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Mapping

LEVELS = {"fma": 1, "avx512f": 2, "avx512bf16": 3, "amx-tile": 4, "amx-bf16": 4}
"""LLVM's names of the instruction sets that our loops are written for."""
TILES = {"amx-tile", "amx-bf16"}
LIMITS = {
    **dict.fromkeys(("SSE41", "AVX"), 0),
    **dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), 1),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), 2),
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"), 3),
}
"""The level that a value of `ONEDNN_MAX_CPU_ISA` leaves; any other value limits nothing, as in oneDNN."""
ASK_FOR_TILES = (158, 0x1023, 18)
"""Linux's call arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) on x86-64."""


def usable(features: Mapping[str, bool]) -> set[str]:
    """Return which of `LEVELS` may be used on a processor with these features.

    If the system refuses AMX's registers to this process, a warning is logged that says so.
    """
    names = {name for name in LEVELS if features.get(name) and not beyond_limit(name)}
    if names >= TILES and (refusal := ask_for_tiles()) is not None:
        names -= TILES
        logging.getLogger(__name__).warning(
            "bfloat16 is multiplied without AMX, since the system refuses its registers: %s", refusal
        )
    return names


def beyond_limit(name: str) -> bool:
    """Whether the limit leaves out an instruction set, by LLVM's name; those that `LEVELS` lacks go with their kind."""
    limit = LIMITS.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), max(LEVELS.values()))
    kinds = {"avx512": 2, "avx10": 3, "amx": 4}
    return LEVELS.get(name, max((kinds[kind] for kind in kinds if name.startswith(kind)), default=0)) > limit


def ask_for_tiles() -> str | None:
    """Ask the system to let this process use AMX's registers; return None, or why it refuses."""
    if sys.platform != "linux":
        return f"they are asked for on Linux only, and this is {sys.platform}"
    system = ctypes.CDLL(None, use_errno=True)
    if system.syscall(*map(ctypes.c_long, ASK_FOR_TILES)) == 0:
        return None
    return os.strerror(ctypes.get_errno())
