"""A small vocabulary for writing loops over vectors in LLVM's language, and the machine that they are compiled for.

`fused_kernels.py` writes its loops with it. LLVM comes as a wheel (llvmlite) and compiles in memory, within a
fraction of a second: no compiler has to be installed, and nothing is kept on disk.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import llvmlite.binding as llvm
from llvmlite import ir

I1, I32, I64, POINTER = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.PointerType()
Values = Sequence[ir.Value]
CACHE_LINE = 64
"""Bytes."""


@dataclass(frozen=True)
class Machine:
    """What decides how loops are cut: the width of a vector register and how many there are."""

    cpu: str
    """LLVM's name of the processor."""
    features: str
    """LLVM's list of its instruction sets, "+avx2,-avx512f,..."."""
    vector_bytes: int
    registers: int


@functools.cache
def this_machine() -> Machine | None:
    """Return the machine that we run on; None if it has no instructions for left · right + total on vectors."""
    features = llvm.get_host_cpu_features()
    if platform.machine().lower() in ("arm64", "aarch64"):
        vector_bytes, registers = 16, 32
    elif features.get("avx512f"):
        vector_bytes, registers = 64, 32
    elif features.get("fma"):
        vector_bytes, registers = 32, 16
    else:
        return None
    return Machine(llvm.get_host_cpu_name(), features.flatten(), vector_bytes, registers)


class Code:
    """Machine code in memory, which lives as long as this does."""

    def __init__(self, engine: llvm.ExecutionEngine):
        self.engine = engine
        self.addresses: dict[str, int] = {}

    def address(self, name: str) -> int:
        """Return where a function begins."""
        if name not in self.addresses:
            self.addresses[name] = int(self.engine.get_function_address(name))
        return self.addresses[name]


def compile_module(module: ir.Module, machine: Machine) -> Code:
    """Compile a module; its functions may be called as long as the result lives."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=machine.cpu, features=machine.features, opt=3, jit=True
    )
    compiled = llvm.parse_assembly(str(module))
    compiled.verify()
    # The loops are cut to the registers already; unrolled or vectorised once more they would spill.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(compiled, passes)
    engine = llvm.create_mcjit_compiler(compiled, target)
    engine.finalize_object()
    return Code(engine)


def whole(value: int) -> ir.Constant:
    """A whole number."""
    return ir.Constant(I64, value)


def smaller(writer: Writer, left: ir.Value, right: ir.Value) -> ir.Value:
    """The smaller one of two whole numbers."""
    return writer.b.select(writer.b.icmp_signed("<", left, right), left, right)


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
        self.fma = _intrinsic(
            module, f"llvm.fma.v{lanes}f{8 * self.itemsize}", self.vector, [self.vector] * 3
        )
        self.fetch = _intrinsic(module, "llvm.prefetch.p0", ir.VoidType(), [POINTER, I32, I32, I32])

    def vector_of(self, lanes: int) -> ir.VectorType:
        """The type of a vector of another length."""
        return ir.VectorType(self.number, lanes)

    def zero(self, kind: ir.Type | None = None) -> ir.Constant:
        """A vector of zeros."""
        return ir.Constant(self.vector if kind is None else kind, None)

    def at(self, base: ir.Value, index: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        """The address of `base[index]`."""
        return self.b.gep(base, [index], source_etype=self.number if kind is None else kind)

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
        return [self.load(self.at(address, whole(v * self.lanes))) for v in range(count)]

    def store_vectors(self, values: Values, address: ir.Value) -> None:
        """Write neighbouring vectors."""
        for v, value in enumerate(values):
            self.store(value, self.at(address, whole(v * self.lanes)))

    def prefetch(self, address: ir.Value, vectors: int, *, near: bool = True) -> None:
        """Ask for the memory there; an address of nothing does no harm.

        Args:
            address: of the first vector.
            vectors: how many.
            near: whether they will be needed soon, and should come to the first-level cache.
        """
        for first in range(0, vectors * self.lanes, CACHE_LINE // self.itemsize):
            line = self.at(address, whole(first))
            self.b.call(self.fetch, [line, *(I32(value) for value in (0, 3 if near else 2, 1))])

    def integer(self, address: ir.Value, kind: ir.Type = I32) -> ir.Value:
        """Read an integer that is not negative."""
        value = self.b.load(address, typ=kind)
        return value if kind is I64 else self.b.zext(value, I64)

    def repeated(self, address: ir.Value, count: int = 1) -> ir.Value:
        """Read `count` numbers and repeat them over a vector: a b a b ..."""
        few = self.vector_of(count)
        return self.shuffled(self.load(address, few), [lane % count for lane in range(self.lanes)])

    def spread(self, value: ir.Value) -> ir.Value:
        """A vector full of one number."""
        first = self.b.insert_element(ir.Constant(self.vector, ir.Undefined), value, I32(0))
        return self.shuffled(first, [0] * self.lanes)

    def total(self, vector: ir.Value) -> ir.Value:
        """The sum of a vector's numbers, halves added first."""
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            low, high = (self.shuffled(vector, range(first, first + lanes)) for first in (0, lanes))
            vector = self.b.fadd(low, high)
        return self.b.extract_element(vector, I32(0))

    def shuffled(self, value: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """The lanes of a vector in another order or number."""
        return self.merged(value, ir.Constant(value.type, ir.Undefined), lanes)

    def merged(self, first: ir.Value, second: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Some lanes of two vectors; the second one's count on."""
        return self.b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def multiply_add(self, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
        """left · right + total, rounded once."""
        return self.b.call(self.fma, [left, right, total])

    def loop(
        self,
        start: ir.Value,
        stop: ir.Value,
        step: ir.Value,
        carried: Values,
        body: Callable[[ir.Value, Values], Values],
    ) -> tuple[ir.Value, Values]:
        """for i in range(start, stop, step): carried = body(i, carried). Return the first i not used, and `carried`."""
        b, before = self.b, self.b.block
        head, inside, after = (self.function.append_basic_block(name) for name in ("head", "body", "end"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(start, before)
        values = []
        for value in carried:
            phi = b.phi(value.type)
            phi.add_incoming(value, before)
            values.append(phi)
        b.cbranch(b.icmp_signed("<", index, stop), inside, after)
        b.position_at_end(inside)
        new = body(index, values)
        index.add_incoming(b.add(index, step, flags=["nsw"]), b.block)
        for phi, value in zip(values, new, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return index, values

    def each(self, count: ir.Value, body: Callable[[ir.Value], object]) -> None:
        """for i in range(count): body(i)."""
        self.tiles(count, (1,), lambda index, _: body(index))

    def tiles(
        self, count: ir.Value, sizes: Sequence[int], body: Callable[[ir.Value, int], object], start: int = 0
    ) -> None:
        """Cover range(start, count) by tiles of the first size, what is left by smaller ones; the last size is 1."""
        first: ir.Value = whole(start)
        for size in sizes:

            def tile(index: ir.Value, _: Values, size: int = size) -> Values:
                body(index, size)
                return []

            stop = self.b.sub(count, whole(size - 1))
            first, _ = self.loop(first, stop, whole(size), [], tile)


def _intrinsic(module: ir.Module, name: str, result: ir.Type, arguments: Values) -> ir.Function:
    known = module.globals.get(name)
    return known or ir.Function(module, ir.FunctionType(result, arguments), name)
