"""Compiled functions that several threads call side by side, each taking the next task until none is left.

What a function needs stands in a *record*, one 64-bit word per field: addresses and whole numbers. Which thread takes
which task does not matter: every task writes places of its own.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence

import torch
from llvmlite import ir
from torch import Tensor

from switchable.ffn.experts.llvm import I64, POINTER, Code, Writer, whole

ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""The type of a compiled function: takes the address of its record."""


class Record:
    """A record in compiled code: the fields' values by name.

    Args:
        writer: of a function whose only argument is the record's address.
        numbers: names of the fields that hold whole numbers.
        addresses: names of those that hold addresses.
    """

    def __init__(self, writer: Writer, numbers: Sequence[str], addresses: Sequence[str]):
        self.next = writer.arguments[0]
        self.values = {}
        for place, name in enumerate(_fields(numbers, addresses)):
            word = writer.at(self.next, whole(place), I64)
            self.values[name] = writer.b.load(word, typ=POINTER if name in addresses else I64)

    def __getitem__(self, name: str) -> ir.Value:
        return self.values[name]


def _fields(numbers: Sequence[str], addresses: Sequence[str]) -> list[str]:
    return ["next", "tasks", *numbers, *addresses]


class Tasks:
    """A kind of record, and the functions that take one.

    Args:
        numbers: names of its whole numbers.
        addresses: names of its addresses.
    """

    def __init__(self, numbers: Sequence[str], addresses: Sequence[str]):
        self.numbers, self.addresses = numbers, addresses
        self.places = {name: place for place, name in enumerate(_fields(numbers, addresses))}

    def write(self, writer: Writer, body: Callable[[Record, ir.Value], None]) -> None:
        """Write `while (task = next++) < tasks: body(record, task)` and close the function."""
        b, record = writer.b, Record(writer, self.numbers, self.addresses)
        again, work, done = (b.function.append_basic_block(name) for name in ("again", "work", "done"))
        b.branch(again)
        b.position_at_end(again)
        number = b.atomic_rmw("add", record.next, whole(1), "monotonic")
        b.cbranch(b.icmp_signed("<", number, record["tasks"]), work, done)
        b.position_at_end(work)
        body(record, number)
        b.branch(again)
        b.position_at_end(done)
        b.ret_void()

    def run(self, code: Code, name: str, tasks: int, **fields: Tensor | int | None) -> None:
        """Do all tasks of a function with as many threads as torch uses, and wait for them.

        Tensors stand for the addresses of their numbers, which must lie as the function expects them; None for 0.
        """
        record = (ctypes.c_int64 * len(self.places))()
        record[self.places["tasks"]] = tasks
        for field, value in fields.items():
            record[self.places[field]] = value.data_ptr() if isinstance(value, Tensor) else value or 0
        _side_by_side(code.address(name), ctypes.addressof(record), min(torch.get_num_threads(), tasks))


def _side_by_side(entry: int, record: int, threads: int) -> None:
    """Call entry(record) in several threads and wait for them."""
    call = ENTRY(entry)
    if threads <= 1:
        call(record)
        return
    parallel = _openmp()
    if parallel is not None:
        # torch's own threads: others would share the cores with those, which wait for work by spinning.
        parallel(entry, record, threads, 0)
        return
    others = [threading.Thread(target=call, args=(record,)) for _ in range(threads - 1)]
    for other in others:
        other.start()
    call(record)
    for other in others:
        other.join()


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """GNU OpenMP's call for "run this function in so many threads", if torch has loaded it."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    entry, number = ctypes.c_void_p, ctypes.c_uint
    return ctypes.cast(parallel, ctypes.CFUNCTYPE(None, entry, entry, number, number))
