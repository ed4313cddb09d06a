"""Timing that survives a noisy machine: contenders take turns, and ratios are taken within a turn.

    ratio = median over turns of (seconds of the baseline / seconds of the contender)

A slow phase of the machine then hits all contenders of a turn alike. Medians are reported, never the best.
"""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Times:
    """Seconds per call, one list entry per turn."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds of every contender."""
        return {name: self.median(name) for name in self.seconds}

    def ratio(self, baseline: str, name: str) -> float:
        """How many times faster than the baseline."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        return statistics.median(base / own for base, own in pairs)


def take_turns(
    contenders: Mapping[str, Callable[[], object]], seconds: float, repeat: int = 1, turns: int = 3,
    wait: Callable[[], object] = lambda: None, clock: Callable[[], float] | None = None,
) -> Times:  # fmt: skip
    """Time contenders in turns, after one turn of warming up that does not count.

    Args:
        contenders: calls by name.
        seconds: for all turns together.
        repeat: calls per measurement, for calls too short for the clock.
        turns: at least so many are made, however long they take.
        wait: returns when the device has done what it was asked for.
        clock: tells the seconds, the wall's by default; `time.process_time` leaves out waiting for others' work.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    now = clock or time.perf_counter
    for call in contenders.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(len(values) for values in times.values()) < turns:
        for name, call in contenders.items():
            wait()
            start = now()
            for _ in range(repeat):
                call()
            wait()
            times[name].append((now() - start) / repeat)
    return Times(times)


@functools.cache
def processor() -> str:
    """Return the name of this machine's processor."""
    names = [platform.machine()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("model name")][:1]
    else:
        names.append(platform.processor())
    return " ".join(name for name in names if name)
