"""The Triton kernels built for a GPU that is not here: compiled in earnest, launched nowhere.

    python -m benchmarks.ffn_cuda_build [--capability 90] [--quick]

Triton's interpreter tells whether the kernels compute the right thing, not whether a GPU could run them. Here a
stand-in for Triton's driver lets forward and backward go through tuning and launch as on a GPU: everything that would
be compiled is, down to machine code, and whatever asks for more shared memory than a block may have is refused. It
tells of every kernel and choice of block sizes

    registers, spilled    per thread, and bytes of them that would not fit and live in memory
    shared KiB            of a block
    blocks                that share a multiprocessor (registers, shared memory and warps permitting)
    tensor cores          the instruction that multiplies: HGMMA on an H100, HMMA on an A100, - for none

and fails when a kernel does not compile, when no choice of block sizes fits, or when a 16-bit product uses no tensor
cores. How fast they are, only a GPU tells (`benchmarks.ffn_cuda`). Needs no GPU, but triton. The last line is one JSON
document.

Sizes of GPUs: CUDA C++ Programming Guide, table of technical specifications per compute capability.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from switchable.compute.cuda.triton import launch

KIB = 1024
REGISTERS = 65_536
"""Of a multiprocessor; a warp gets them in units of 256."""
PRODUCTS = re.compile(r"\b(UTC\w*MMA|HGMMA|HMMA|QGMMA)\b")
BLOCKS = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
MULTIPLIES = ("up_kernel", "hidden_grad_kernel", "down_kernel", "weight_grad_kernel")
HEADS = (
    f"  {'kernel':20}{'M x N x K':>16}{'warps':>7}{'stages':>8}{'registers':>11}{'spilled':>9}{'shared KiB':>12}"
    f"{'blocks':>8}{'tensor cores':>14}"
)


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks on one multiprocessor share."""

    block_shared: int
    """Most shared memory of a block, in bytes."""
    shared: int
    """Of all blocks; each takes a KiB more than it asks for."""
    warps: int

    def blocks(self, registers: int, shared: int, warps: int) -> int:
        """Return how many blocks run on it at a time."""
        by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // warps
        return min(by_registers, self.shared // (shared + KIB), self.warps // warps)


GPUS = {
    80: Multiprocessor(163 * KIB, 164 * KIB, 64),  # A100
    89: Multiprocessor(99 * KIB, 100 * KIB, 48),  # L4, RTX 4090
    90: Multiprocessor(227 * KIB, 228 * KIB, 64),  # H100, H200
    100: Multiprocessor(227 * KIB, 228 * KIB, 64),  # B200
}
"""Compute capability -> its multiprocessor."""


@dataclass(frozen=True)
class Case:
    """One call of the sparse FFN, forward and perhaps backward."""

    T: int = 16_384
    D: int = 2_048
    F: int = 8_192
    E: int = 32
    K: int = 8
    dtype: torch.dtype = torch.bfloat16
    stored: str = "FD DF"
    """Memory layout of up and of down: nn.Linear's is FD DF, Conv1D's DF FD."""
    squared: bool = True
    backward: bool = True

    def __str__(self) -> str:
        marks = "".join(f" {name}" for name in ("squared", "backward") if getattr(self, name))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T={self.T} D={self.D} F={self.F} E={self.E} K={self.K} {dtype} {self.stored}{marks}"


MAIN = Case()
CASES = (
    MAIN,
    Case(squared=False),
    Case(stored="DF FD"),
    Case(T=1, backward=False),
    Case(T=16, backward=False),
    Case(D=768, F=3072, K=6),
    Case(D=4096, F=16384),
    Case(D=37, F=84, E=4, K=2, T=19),
    Case(dtype=torch.float16),
    Case(D=768, F=3072, K=6, dtype=torch.float32),
)


@dataclass
class Built:
    """One kernel with one choice of block sizes."""

    kernel: str
    case: str
    blocks: dict[str, int]
    warps: int
    stages: int
    shared: int
    registers: int | None = None
    """None where it asks for more shared memory than there is."""
    spilled: int | None = None
    per_multiprocessor: int | None = None
    tensor_cores: str | None = None
    instructions: int | None = None


@dataclass
class StandIn(DriverBase):  # type: ignore[misc]
    """Triton's driver of a GPU that is not there: it takes binaries and runs nothing."""

    capability: int
    case: str = ""
    built: list[Built] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.utils = self  # whom Triton asks for the device's properties and to load a binary

    @classmethod
    def is_active(cls) -> bool:
        """It never offers itself."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Return nothing of use: nothing is launched, so no launcher is compiled, which alone asks."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        """Return the device of the tensors, which have no memory."""
        return torch.device("meta")

    def get_current_stream(self, *_device: int) -> int:
        """Return the only one."""
        return 0

    get_current_device = get_current_stream

    def get_device_properties(self, *_device: int) -> dict[str, int]:
        """Return the most shared memory of a block, by which Triton refuses a kernel."""
        return {"max_shared_mem": GPUS[self.capability].block_shared}

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        """Return a clock by which all block sizes are equally fast: the tuner builds and tries every one."""

        def clock(kernel_call: Callable[[], object], quantiles: Sequence[float], **_: Any) -> Sequence[float]:
            kernel_call()
            return [1.0] * len(quantiles)

        return clock

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """Note a kernel that has been compiled; return what launches it: nothing."""
        constants = {src.fn.arg_names[path[0]]: value for path, value in src.constants.items()}
        sizes = {name: constants[name] for name in BLOCKS if name in constants}
        self.built.append(
            Built(metadata.name, self.case, sizes, metadata.num_warps, metadata.num_stages, metadata.shared)
        )
        return lambda *_: None

    def load_binary(self, *loaded: Any) -> tuple[int, int, int, int, int]:
        """Read machine code instead; return (module, function, registers, spilled, most threads).

        Args:
            loaded: name, binary, shared memory, device.
        """
        last = self.built[-1]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(loaded[1])
            file.flush()
            tools = triton.knobs.nvidia
            usage, code = (
                subprocess.run([*tool, file.name], capture_output=True, text=True, check=True).stdout
                for tool in ((tools.cuobjdump.path, "-res-usage"), (tools.nvdisasm.path, "-c"))
            )
        used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        last.registers, last.spilled = used["REG"], used["STACK"] + used["LOCAL"]
        last.per_multiprocessor = GPUS[self.capability].blocks(last.registers, last.shared, last.warps)
        product = PRODUCTS.search(code)
        last.tensor_cores = product.group(1) if product else None
        last.instructions = code.count(";")
        return 0, 0, last.registers, last.spilled, KIB


@contextmanager
def standing_in(capability: int) -> Iterator[StandIn]:
    """Let Triton compile for a GPU of a compute capability, with a cache of its own: nothing here was measured."""
    driver = StandIn(capability)
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        triton.runtime.driver.set_active(driver)
        try:
            yield driver
        finally:
            triton.runtime.driver.set_active(None)  # to be looked up when next needed


def build(case: Case) -> None:
    """Go through a forward, and perhaps a backward, on tensors without memory."""

    def empty(*size: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, grad, ids = empty(case.T, case.D), empty(case.T, case.D), empty(case.T, case.K, dtype=torch.int64)
    up, down = (
        empty(case.F, case.D) if order == "FD" else empty(case.D, case.F).t() for order in case.stored.split()
    )
    y_h_rows = launch.forward(x, up, down, empty(case.F), ids, case.E, case.squared)
    if case.backward:
        launch.backward(grad, x, up, down, *y_h_rows[1:], case.squared, wanted=[True] * 4)


def faults(case: Case, built: Sequence[Built]) -> list[str]:
    """Return what is wrong with the kernels of one case."""
    found = []
    for kernel in sorted({b.kernel for b in built}):
        fitting = [b for b in built if b.kernel == kernel and b.registers is not None]
        if not fitting:
            found.append(f"{case}: no block sizes of {kernel} fit")
        slow = [b.blocks for b in fitting if b.tensor_cores is None]
        if slow and kernel in MULTIPLIES and case.dtype.itemsize == 2:
            found.append(f"{case}: {kernel} multiplies without tensor cores with {slow}")
    return found


def line(built: Built) -> str:
    """Return a row of the table."""
    sizes = " x ".join(map(str, built.blocks.values()))
    row = f"  {built.kernel:20}{sizes:>16}{built.warps:>7}{built.stages:>8}"
    if built.registers is None:
        return row + f"{'does not fit':>20}{built.shared / KIB:>12g}"
    return (
        row + f"{built.registers:>11}{built.spilled:>9}{built.shared / KIB:>12g}"
        f"{built.per_multiprocessor:>8}{built.tensor_cores or '-':>14}"
    )


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, choices=GPUS, default=90, help="default: 90, an H100")
    parser.add_argument("--quick", action="store_true", help="the first case only")
    args = parser.parse_args()
    wrong: list[str] = []
    with standing_in(args.capability) as driver:
        for case in CASES[:1] if args.quick else CASES:
            driver.case, before = str(case), len(driver.built)
            build(case)
            mine = driver.built[before:]
            print("\n".join(["", str(case), HEADS, *map(line, mine)]), flush=True)
            wrong += faults(case, mine)
    for fault in wrong:
        print(f"ffn_cuda_build: {fault}", file=sys.stderr)
    report = {
        "benchmark": "ffn_cuda_build",
        "capability": args.capability,
        "triton": triton.__version__,
        "faults": wrong,
        "built": [asdict(b) for b in driver.built],
    }
    print(json.dumps(report))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
