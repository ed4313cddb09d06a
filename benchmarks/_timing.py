"""Timing that survives a noisy machine: contenders take turns, and ratios are taken within a turn.

    ratio = median over turns of (seconds of the baseline / seconds of the contender)

A slow phase of the machine then hits all contenders of a turn alike. Medians are reported, never the best.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds per call, one list entry per turn."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a contender."""
        return statistics.median(self.seconds[name])

    def ratio(self, baseline: str, name: str) -> float:
        """How many times faster than the baseline."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        return statistics.median(base / own for base, own in pairs)


def take_turns(contenders: Mapping[str, Callable[[], object]], seconds: float, repeat: int = 1) -> Times:
    """Time the contenders in turns for about `seconds`, three turns at least, after one turn of warming up.

    Args:
        contenders: calls by name.
        seconds: for all turns together.
        repeat: calls per measurement, for calls too short for the clock.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(len(values) for values in times.values()) < 3:
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            times[name].append((time.perf_counter() - start) / repeat)
    return Times(times)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the profiler's C++ half from writing to the streams; nothing in Python can ask it to be quiet."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in kept:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def peak_bytes(call: Callable[[], object], forget: Callable[[], object]) -> int:
    """Return the most CPU memory that tensors take during a call, beyond what there was before.

    From the profiler's record of every allocation, so caches of the allocator do not count. The first call, which may
    set things up, is not looked at; `forget` frees what it has left behind, gradients and memory that is kept.
    """
    call()
    forget()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    profiler = profile.profiler
    assert profiler is not None
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak
