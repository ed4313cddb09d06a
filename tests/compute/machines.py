"""This machine, and machines with narrower vectors, which run the same instructions."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from switchable.compute.cpu.llvm import Machine, this_machine

HERE = this_machine()
needs_instructions = pytest.mark.skipif(HERE is None, reason="a processor without multiply-add instructions")
MACHINES: dict[int, Machine] = {}
if HERE is not None:
    narrower = {
        32: replace(HERE, vector_bytes=32, registers=16),
        16: replace(HERE, vector_bytes=16, registers=32),
    }
    MACHINES |= {
        size: machine for size, machine in ({64: HERE} | narrower).items() if size <= HERE.vector_bytes
    }


def machine_seen_by(*modules: ModuleType) -> Any:
    """A fixture: what these modules take for this machine, each machine in turn."""

    @pytest.fixture(params=MACHINES.values(), ids=[f"{size} bytes" for size in MACHINES])
    def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
        found: Machine = request.param
        for module in modules:
            monkeypatch.setattr(module, "this_machine", lambda: found)
        return found

    return machine
