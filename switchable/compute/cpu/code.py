"""From a module in LLVM's language to machine code in memory.

LLVM comes as a wheel (llvmlite) and compiles in memory, within a fraction of a second: no compiler has to be
installed, and nothing is kept on disk.
"""

from __future__ import annotations

import re

import llvmlite.binding as llvm
from llvmlite import ir

from switchable.compute.cpu.llvm import Machine

NAME = re.compile(r'@"([^"]+)"')
"""Of a function or constant in LLVM's language."""


class Code:
    """Functions as machine code in memory, which lives as long as this does.

    Each is compiled, with all that it names, when its address is first asked for: a model needs some of a module's.
    """

    def __init__(self, module: ir.Module, machine: Machine):
        self.machine = machine
        self._texts = {each.name: str(each) for each in module.global_values}
        self._engines: list[llvm.ExecutionEngine] = []  # they hold the code
        self._addresses: dict[str, int] = {}

    def address(self, name: str) -> int:
        """Return where a function begins."""
        if name not in self._addresses:
            engine = _compiled("\n".join(self._named_by(name).values()), self.machine)
            self._engines.append(engine)
            self._addresses[name] = int(engine.get_function_address(name))
        return self._addresses[name]

    def _named_by(self, name: str) -> dict[str, str]:
        """Return the text of a function and of all that it names, by their names."""
        found: dict[str, str] = {}
        names = [name]
        while names:
            found |= {each: self._texts[each] for each in names}
            names = [each for text in found.values() for each in NAME.findall(text) if each not in found]
        return found


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
