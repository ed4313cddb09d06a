"""A small vocabulary for writing loops over vectors in LLVM's language, and the machine that they are written for.

    Writer("dot", ...)  ->  LLVM IR  ->  Code (code.py)  ->  machine code in memory, called through ctypes (tasks.py)

All loops of the CPU's backends are written with it.

Source: LLVM's language reference (getelementptr, shufflevector, llvm.fma, llvm.prefetch).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import llvmlite.binding as llvm
from llvmlite import ir

from switchable.compute.cpu.amx import AMX
from switchable.compute.cpu.instructions import TILES, beyond_limit, usable

I1, I32, I64, POINTER = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.PointerType()
Values = Sequence[ir.Value]
Index: TypeAlias = ir.Value | int
"""An int64 in the code that is written: computed there, or known now."""
CACHE_LINE = 64
"""Bytes."""


class _BFloat16(ir.Type):  # type: ignore[misc, unused-ignore]
    """LLVM's bfloat, for which llvmlite has no name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


BFLOAT16 = _BFloat16()


@dataclass(frozen=True)
class Machine:
    """What decides how loops are tiled: the width of a vector register and how many there are."""

    cpu: str
    """LLVM's name of the processor."""
    features: str
    """LLVM's list of its instruction sets, "+avx2,-avx512f,..."."""
    vector_bytes: int
    registers: int
    pairs: bool = False
    """Whether an instruction multiplies pairs of bfloat16 and adds both products to a float32 (AVX512-BF16)."""
    amx: AMX | None = None
    """What writes AMX's instructions, where it may be used."""


@functools.cache
def this_machine() -> Machine | None:
    """Return the machine that we run on; None if it has no fused multiply-add on vectors."""
    features = llvm.get_host_cpu_features()
    for name in features:
        features[name] = features[name] and not beyond_limit(name)  # else LLVM would use them on its own
    names = usable(features)
    if platform.machine().lower() in ("arm64", "aarch64"):
        vector_bytes, registers = 16, 32
    elif "avx512f" in names:
        vector_bytes, registers = 64, 32
    elif "fma" in names:
        vector_bytes, registers = 32, 16
    else:
        return None
    pairs, amx = "avx512bf16" in names, AMX() if names >= TILES else None
    return Machine(llvm.get_host_cpu_name(), features.flatten(), vector_bytes, registers, pairs, amx)


def i64(value: Index) -> ir.Value:
    """An int64 constant; what is a value already stays as it is."""
    return ir.Constant(I64, value) if isinstance(value, int) else value


class Writer:
    """Appends instructions to one function; numbers in memory are float32 or float64.

    Args:
        module: gets the function.
        name: of the function, which returns nothing.
        arguments: their types.
        wide: whether numbers are float64.
        lanes: numbers in a vector.
    """

    def __init__(self, module: ir.Module, name: str, arguments: Values, *, wide: bool, lanes: int):
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), name)
        self.arguments: Values = self.function.args
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.number = ir.DoubleType() if wide else ir.FloatType()
        self.itemsize, self.lanes = 8 if wide else 4, lanes
        self.vector = self.vector_of(lanes)

    def vector_of(self, lanes: int) -> ir.VectorType:
        """The type of a vector of another length."""
        return ir.VectorType(self.number, lanes)

    def zero(self, kind: ir.Type | None = None) -> ir.Constant:
        """A vector of zeros."""
        return ir.Constant(self.vector if kind is None else kind, None)

    def add(self, left: Index, right: Index) -> ir.Value:
        """left + right."""
        return self.b.add(i64(left), i64(right))

    def sub(self, left: Index, right: Index) -> ir.Value:
        """left - right."""
        return self.b.sub(i64(left), i64(right))

    def mul(self, left: Index, right: Index) -> ir.Value:
        """left · right."""
        return self.b.mul(i64(left), i64(right))

    def div(self, left: Index, right: Index) -> ir.Value:
        """left / right, rounded towards 0."""
        return self.b.sdiv(i64(left), i64(right))

    def compare(self, left: Index, sign: str, right: Index) -> ir.Value:
        """left < right, or another comparison."""
        return self.b.icmp_signed(sign, i64(left), i64(right))

    def minimum(self, left: Index, right: Index) -> ir.Value:
        """The smaller one of two."""
        return self.b.select(self.compare(left, "<", right), i64(left), i64(right))

    def share(self, count: Index, number: Index, parts: Index) -> list[ir.Value]:
        """Begin and end of part `number` if range(count) is cut into so many nearly equal parts."""
        return [self.div(self.mul(count, end), parts) for end in (number, self.add(number, 1))]

    def at(self, base: ir.Value, index: Index, kind: ir.Type | None = None) -> ir.Value:
        """The address of `base[index]`."""
        return self.b.gep(base, [i64(index)], source_etype=self.number if kind is None else kind)

    def load(self, address: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        """Read a vector, aligned like its numbers."""
        return self.b.load(address, align=self.itemsize, typ=self.vector if kind is None else kind)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Write a vector, aligned like its numbers."""
        self.b.store(value, address, align=self.itemsize)

    def scratch(self, count: int, kind: ir.Type | None = None) -> ir.Value:
        """Space for so many numbers, as long as the function runs."""
        with self.b.goto_entry_block():  # once, whatever loop asks for it
            typed = self.b.alloca(self.number if kind is None else kind, count)
            typed.align = CACHE_LINE
        # llvmlite types this address, and no other.
        return self.b.inttoptr(self.b.ptrtoint(typed, I64), POINTER)

    def vectors(self, address: ir.Value, count: int) -> list[ir.Value]:
        """Read neighbouring vectors."""
        return [self.load(self.at(address, v * self.lanes)) for v in range(count)]

    def store_vectors(self, values: Values, address: ir.Value) -> None:
        """Write neighbouring vectors."""
        for v, value in enumerate(values):
            self.store(value, self.at(address, v * self.lanes))

    def prefetch(self, address: ir.Value, vectors: int, *, near: bool = True) -> None:
        """Ask for the memory there; an address of nothing does no harm.

        Args:
            address: of the first vector.
            vectors: how many.
            near: whether they will be needed soon, and should come to the first-level cache.
        """
        for first in range(0, vectors * self.lanes, CACHE_LINE // self.itemsize):
            line, level = self.at(address, first), I32(3 if near else 2)
            self.call("llvm.prefetch.p0", ir.VoidType(), line, I32(0), level, I32(1))

    def integer(self, address: ir.Value, kind: ir.Type = I32) -> ir.Value:
        """Read an integer that is not negative."""
        value = self.b.load(address, typ=kind)
        return value if kind is I64 else self.b.zext(value, I64)

    def put32(self, value: ir.Value, address: ir.Value) -> None:
        """Write an integer as an int32."""
        self.b.store(self.b.trunc(value, I32), address)

    def increment(self, address: ir.Value) -> ir.Value:
        """Add 1 to an int32 in memory and return what it was."""
        before = self.b.load(address, typ=I32)
        self.b.store(self.b.add(before, I32(1)), address)
        return before

    def load_broadcast(self, address: ir.Value, count: int = 1) -> ir.Value:
        """Read `count` numbers and broadcast them over a vector: a b a b ..."""
        numbers = self.load(address, self.vector_of(count))
        return self.shuffle(numbers, [lane % count for lane in range(self.lanes)])

    def broadcast(self, value: ir.Value, lanes: int) -> ir.Value:
        """A vector of one value, so many times."""
        empty = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        return self.shuffle(self.b.insert_element(empty, value, I32(0)), [0] * lanes)

    def compress(self, vector: ir.Value, taken: ir.Value) -> ir.Value:
        """The lanes that are taken one after another, and anything behind them; AVX-512 has an instruction for it."""
        kind, anything = vector.type, ir.Constant(vector.type, ir.Undefined)
        name = f"llvm.experimental.vector.compress.v{kind.count}{kind.element.intrinsic_name}"
        return vector if kind.count == 1 else self.call(name, kind, vector, taken, anything)

    def count(self, taken: ir.Value) -> ir.Value:
        """How many lanes are taken."""
        return self.b.zext(self.b.ctpop(self.b.bitcast(taken, ir.IntType(taken.type.count))), I64)

    def reduce_each(self, vectors: Values) -> ir.Value:
        """A vector of the sums of 1, 2, 4, ... vectors' numbers, halves added first; as many as lanes at most."""
        sums, size = list(vectors), vectors[0].type.count
        while size := size // 2:
            pairs = list(zip(sums[::2], sums[1::2], strict=False)) or [(sums[0], None)]
            numbers = sums[0].type.count * (1 if len(sums) == 1 else 2)
            lower = [i for i in range(numbers) if i % (2 * size) < size]
            upper = [i + size for i in lower]
            sums = [self.b.fadd(self.shuffle(a, lower, b), self.shuffle(a, upper, b)) for a, b in pairs]
        return sums[0]

    def reduce_add(self, vector: ir.Value) -> ir.Value:
        """The sum of a vector's numbers, halves added first."""
        return self.b.extract_element(self.reduce_each([vector]), I32(0))

    def shuffle(self, first: ir.Value, lanes: Sequence[int], second: ir.Value | None = None) -> ir.Value:
        """A vector of some lanes of one or two vectors; the second one's numbers count on."""
        other = ir.Constant(first.type, ir.Undefined) if second is None else second
        return self.b.shuffle_vector(first, other, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def fma(self, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
        """left · right + total, rounded once."""
        return self.call(f"llvm.fma.v{self.lanes}f{8 * self.itemsize}", self.vector, left, right, total)

    def call(self, name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
        """Call a function of LLVM's own or of the C library."""
        kind = ir.FunctionType(result, [operand.type for operand in operands])
        return self.b.call(self.function.module.declare_intrinsic(name, fnty=kind), operands)

    def loop(
        self,
        start: Index,
        stop: Index,
        step: Index,
        carried: Values,
        body: Callable[[ir.Value, Values], Values],
    ) -> tuple[ir.Value, Values]:
        """for i in range(start, stop, step): carried = body(i, carried). Return the first i not used, and `carried`."""
        b, before = self.b, self.b.block
        head, inside, after = (self.function.append_basic_block(name) for name in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(i64(start), before)
        values = []
        for value in carried:
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            values.append(phi)
        b.cbranch(b.icmp_signed("<", index, i64(stop)), inside, after)
        b.position_at_end(inside)
        new = body(index, values)
        index.add_incoming(b.add(index, i64(step), flags=["nsw"]), b.block)
        for phi, value in zip(values, new, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return index, values

    def range(self, start: Index, stop: Index, step: Index, body: Callable[[ir.Value], object]) -> ir.Value:
        """for i in range(start, stop, step): body(i). Return the first i not used."""

        def carrying_nothing(index: ir.Value, _: Values) -> Values:
            body(index)
            return []

        return self.loop(start, stop, step, [], carrying_nothing)[0]

    def each(self, count: Index, body: Callable[[ir.Value], object]) -> None:
        """for i in range(count): body(i)."""
        self.range(0, count, 1, body)

    def tiles(
        self, count: Index, sizes: Sequence[int], body: Callable[[ir.Value, int], object], start: Index = 0
    ) -> None:
        """Cover range(start, count) by tiles of the first size, what is left by smaller ones; the last size is 1."""
        first: Index = start
        for size in sizes:
            stop = self.sub(count, size - 1)
            first = self.range(first, stop, size, lambda index, size=size: body(index, size))  # type: ignore[misc]
