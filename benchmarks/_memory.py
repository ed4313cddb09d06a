"""The most memory that a call takes, from the profiler's record of allocations."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


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
    gc.collect()  # else what hangs in circles of references is freed within the call, and counts as less
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
