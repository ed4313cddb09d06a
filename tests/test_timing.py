"""Timing in turns: hand-computed medians of seconds and of ratios, and how often each contender is called."""

from __future__ import annotations

import pytest

from switchable import timing
from switchable.timing import Times, take_turns


def test_a_ratio_is_the_median_over_turns_and_not_one_of_medians() -> None:
    times = Times({"dense": [4.0, 9.0, 2.0], "sparse": [2.0, 3.0, 2.0]})
    assert times.medians == {"dense": 4.0, "sparse": 2.0}
    assert times.ratio("dense", "sparse") == 2.0  # of 2, 3 and 1
    assert times.ratio("sparse", "dense") == 0.5


def test_contenders_take_turns_after_one_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = [0.0], []

    def contender(name: str, seconds: float) -> None:
        called.append(name)
        clock[0] += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    contenders = {"a": lambda: contender("a", 1.0), "b": lambda: contender("b", 3.0)}
    times = take_turns(contenders, seconds=0.0)
    assert "".join(called) == "ab" * 4
    assert times.seconds == {"a": [1.0] * 3, "b": [3.0] * 3}
    called.clear()
    assert take_turns(contenders, seconds=17.0).medians == {"a": 1.0, "b": 3.0}
    assert "".join(called) == "ab" * 6  # 20 seconds of turns: the fifth begins before 17 have passed
    called.clear()
    assert take_turns(contenders, seconds=0.0, repeat=2, turns=1).medians == {"a": 1.0, "b": 3.0}
    assert "".join(called) == "ab" + "aabb"
    halves = take_turns(contenders, seconds=0.0, clock=lambda: clock[0] / 2)
    assert halves.medians == {"a": 0.5, "b": 1.5}


def test_a_device_is_waited_for_before_and_after_each_measurement() -> None:
    order: list[str] = []
    take_turns({"a": lambda: order.append("a")}, 0.0, turns=1, wait=lambda: order.append("wait"))
    assert order == ["a", "wait", "a", "wait"]
