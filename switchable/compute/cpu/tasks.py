"""Compiled functions that several threads call side by side, each taking the next task until none is left.

What a function needs stands in a *record*, one 64-bit word per field: addresses and whole numbers. Which thread takes
which task does not matter: every task writes places of its own. A function may have several *stages*, each with tasks
of its own, which begin when all tasks of the stage before are done: calling threads together once costs less than once
per stage.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from llvmlite import ir
from torch import Tensor

from switchable.compute.cpu.code import Code
from switchable.compute.cpu.llvm import I64, POINTER, Machine, Writer, i64, this_machine
from switchable.errors import InputError

ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""The type of a compiled function: takes the address of its record."""
floats = functools.partial(torch.empty, dtype=torch.float32, device="cpu")
"""New memory for float32 numbers, as compiled code knows it, whatever torch's default dtype and device are."""

Record: TypeAlias = Mapping[str, ir.Value]
"""A record in compiled code: the fields' values by name."""
Stage: TypeAlias = Callable[[Record, ir.Value], None]
"""Writes what one task does, whose number is given."""


class Tasks:
    """A kind of record, and the functions that take one.

    Args:
        numbers: names of its whole numbers.
        addresses: names of its addresses.
        stages: the most that one of its functions has. Of each, the record counts the tasks begun (`next`), those that
            are done (`done`) and those there are (`tasks`), the later stages' with their number: `next1`.
    """

    def __init__(self, numbers: Sequence[str], addresses: Sequence[str], stages: int = 1):
        counts = [f"{name}{stage or ''}" for name in ("next", "done", "tasks") for stage in range(stages)]
        self.addresses, self.stages = addresses, stages
        self.places = {name: place for place, name in enumerate((*counts, *numbers, *addresses))}
        self.tasks_from = self.places["tasks"]
        self.type = ctypes.c_int64 * len(self.places)

    def write(self, writer: Writer, *stages: Stage) -> None:
        """Write one loop `while (task = next++) < tasks: stage(record, task)` per stage, and close the function."""
        b = writer.b
        words = {name: writer.at(writer.arguments[0], i64(place), I64) for name, place in self.places.items()}
        record = {
            name: b.load(word, typ=POINTER if name in self.addresses else I64) for name, word in words.items()
        }
        for number, stage in enumerate(stages):
            begun, done, tasks = (f"{name}{number or ''}" for name in ("next", "done", "tasks"))
            _do_all(b, words[begun], words[done], record[tasks], functools.partial(stage, record))
            if number + 1 < len(stages):
                _wait(b, words[done], record[tasks])
        b.ret_void()

    def run(self, code: Code, name: str, *tasks: int, **fields: Tensor | int | None) -> None:
        """Do all tasks of a function once, and wait for them; the arguments are those of `Run`."""
        Run(self, code, name, *tasks, **fields)()


def _do_all(
    b: ir.IRBuilder, begun: ir.Value, done: ir.Value, tasks: ir.Value, stage: Callable[[ir.Value], None]
) -> None:
    """Write `while (task = begun++) < tasks: stage(task), done++`; both counts are given by their addresses."""
    again, work, out = (b.function.append_basic_block(name) for name in ("again", "work", "out"))
    b.branch(again)
    b.position_at_end(again)
    task = b.atomic_rmw("add", begun, i64(1), "monotonic")
    b.cbranch(b.icmp_signed("<", task, tasks), work, out)
    b.position_at_end(work)
    stage(task)
    b.atomic_rmw("add", done, i64(1), "release")
    b.branch(again)
    b.position_at_end(out)


def _wait(b: ir.IRBuilder, done: ir.Value, tasks: ir.Value) -> None:
    """Wait for the tasks that other threads are at: whoever began one is running, so this ends."""
    wait, ready = (b.function.append_basic_block(name) for name in ("wait", "ready"))
    b.branch(wait)
    b.position_at_end(wait)
    b.cbranch(b.icmp_signed("<", b.load_atomic(done, "acquire", 8, typ=I64), tasks), wait, ready)
    b.position_at_end(ready)


class Run:
    """A function and its record, to be called any number of times, by one Python thread at a time.

    As many threads as torch uses do its tasks. The memory that the record points to must live as long.

    Args:
        kind: of record.
        code: compiled, with the function in it.
        name: the function's.
        tasks: how many there are in each of its stages.
        fields: the record's. Tensors stand for the addresses of their numbers, which must lie as the function expects
            them; None for 0.
    """

    def __init__(self, kind: Tasks, code: Code, name: str, *tasks: int, **fields: Tensor | int | None):
        self.code, self.places = code, kind.places
        self.kind, self.entry, self.stages = kind, code.address(name), len(tasks)
        record = self.record = kind.type()
        record[kind.tasks_from : kind.tasks_from + len(tasks)] = list(tasks)
        for field, value in fields.items():
            number = value.data_ptr() if isinstance(value, Tensor) else value or 0
            if not number and isinstance(value, Tensor) and value.numel():  # it would end the process
                raise InputError(f"compiled code reads memory; a {type(value).__name__} has none of its own")
            record[kind.places[field]] = number
        self.address, self.counts = ctypes.addressof(record), 2 * kind.stages * ctypes.sizeof(ctypes.c_int64)
        self.work = _in_threads(self.entry, self.address, min(torch.get_num_threads(), max(tasks)))

    def __call__(self) -> None:
        ctypes.memset(self.address, 0, self.counts)  # tasks begun, and those that are done
        self.work()


class Chain:
    """Runs as one call of all threads, each begun when the one before it is done; by one Python thread at a time.

    They are as they were when this was made, but for what is told. The memory that they point to must live as long.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs = tuple(runs)
        self.starts = [0, *itertools.accumulate(len(run.record) for run in runs)]
        records = ctypes.c_int64 * self.starts[-1]
        self.told, self.live = records(), records()
        table = [len(runs)]
        for run, start in zip(runs, self.starts, strict=False):
            counts = 2 * run.kind.stages
            self.told[start + counts : start + len(run.record)] = list(run.record)[counts:]
            last, first = run.stages - 1, ctypes.addressof(self.live) + 8 * start
            done = first + 8 * run.places[f"done{last or ''}"]
            table += [run.entry, first, done, run.record[run.kind.tasks_from + last]]
        self.table = (ctypes.c_int64 * len(table))(*table)
        code, threads = _chain_code(cast(Machine, this_machine())), torch.get_num_threads()
        self.code, self.work = code, _in_threads(code.address("chain"), ctypes.addressof(self.table), threads)

    def tell(self, number: int, **fields: Tensor | int) -> None:
        """Change fields of a run's record for the calls to come; a tensor must live until then."""
        run = self.runs[number]
        start = self.starts[number % len(self.runs)]
        for name, value in fields.items():
            self.told[start + run.places[name]] = value.data_ptr() if isinstance(value, Tensor) else value

    def __call__(self) -> None:
        ctypes.memmove(self.live, self.told, ctypes.sizeof(self.live))  # with all counts at zero
        self.work()


@functools.cache
def _chain_code(machine: Machine) -> Code:
    module = ir.Module("chain")
    w = Writer(module, "chain", [POINTER], wide=False, lanes=machine.vector_bytes // 4)
    kind = ir.FunctionType(ir.VoidType(), [POINTER])

    def run(number: ir.Value) -> None:
        first = w.add(w.mul(number, 4), 1)
        entry, record, done, tasks = (
            w.b.load(w.at(w.arguments[0], w.add(first, i), I64), typ=I64) for i in range(4)
        )
        w.b.call(w.b.inttoptr(entry, kind.as_pointer()), [w.b.inttoptr(record, POINTER)])
        _wait(w.b, w.b.inttoptr(done, POINTER), tasks)

    w.each(w.integer(w.arguments[0], I64), run)
    w.b.ret_void()
    return Code.of(module, "chain", machine)


class Scratch(threading.local):
    """Memory that every thread keeps from one call to the next, for what nobody needs any longer than a call.

    The operating system hands out new memory a page at a time and cleared, which costs more than a pass over it.
    """

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the numbers kept under a name: what the last call has left in them."""
        size = math.prod(shape)
        cached: Tensor | None = self.__dict__.get(name)
        if cached is None or cached.numel() < size or cached.dtype != dtype:
            cached = self.__dict__[name] = torch.empty(size, dtype=dtype, device="cpu")
        return cached[:size].view(*shape)


def _in_threads(entry: int, record: int, threads: int) -> Callable[[], object]:
    """Return what calls entry(record) in several threads and waits for them."""
    call = functools.partial(ENTRY(entry), record)
    if threads <= 1:
        return call
    if (parallel := _openmp()) is not None:
        # torch's own threads: others would share the cores with those, which wait for work by spinning.
        return functools.partial(parallel, entry, record, threads, 0)

    def run() -> None:
        others = [threading.Thread(target=call) for _ in range(threads - 1)]
        for other in others:
            other.start()
        call()
        for other in others:
            other.join()

    return run


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """GNU OpenMP's call for "run this function in so many threads", if torch has loaded it."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    entry, number = ctypes.c_void_p, ctypes.c_uint
    return ctypes.cast(parallel, ctypes.CFUNCTYPE(None, entry, entry, number, number))
