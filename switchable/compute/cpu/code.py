"""From a module in LLVM's language to machine code in memory.

LLVM comes as a wheel (llvmlite) and compiles in memory, within a fraction of a second: no compiler has to be
installed, and nothing is kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.binding as llvm
from llvmlite import ir

from switchable.compute.cpu.llvm import Machine


class Code:
    """Functions as machine code in memory, which lives as long as this does.

    Each is written and compiled when its address is first asked for: a model needs some of them.

    Args:
        write: returns a module with the function of a name, and all that it names.
        machine: to compile for.
    """

    def __init__(self, write: Callable[[str], ir.Module], machine: Machine):
        self._write, self.machine = write, machine
        self._engines: list[llvm.ExecutionEngine] = []  # they hold the code
        self._addresses: dict[str, int] = {}

    @classmethod
    def of(cls, module: ir.Module, name: str, machine: Machine) -> Code:
        """Return one function of a module, compiled at once."""
        code = cls(lambda _: module, machine)
        code.address(name)
        del code._write  # it holds the module, which takes megabytes
        return code

    def address(self, name: str) -> int:
        """Return where a function begins."""
        if name not in self._addresses:
            engine = _compiled("\n".join(map(str, self._write(name).global_values)), self.machine)
            self._engines.append(engine)
            self._addresses[name] = int(engine.get_function_address(name))
        return self._addresses[name]


def _compiled(text: str, machine: Machine) -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=machine.cpu, features=machine.features, opt=3, jit=True
    )
    compiled = llvm.parse_assembly(text)
    compiled.verify()
    # The loops are tiled for the registers already; unrolled or vectorised once more they would spill.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(compiled, passes)
    engine = llvm.create_mcjit_compiler(compiled, target)
    engine.finalize_object()
    return engine
