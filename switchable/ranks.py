"""Several processes, one run: what they agree on, and parameters of which each holds a part.

Everything here does nothing, and costs nothing, in a single process; under torch.distributed every rank must call it
at the same point. Rank 0 speaks for all: it decides, writes and prints. A wrong input that one rank finds is raised
on all of them (a rank that left alone would keep the others waiting).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from switchable.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


class RankLost(RuntimeError):
    """Another rank died or does not answer; what was saved before stands."""


@contextmanager
def watched() -> Iterator[None]:
    """Within the `with` block, torch's errors about a rank that is gone become `RankLost`."""
    try:
        yield
    except RuntimeError as error:
        told = str(error).lower()
        signs = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "gloo")
        lost = isinstance(error, dist.DistError) or any(sign in told for sign in signs)
        if not (running() and lost):
            raise
        raise RankLost(str(error).splitlines()[0]) from error


def running() -> bool:
    """Return whether this process is one of several ranks (or of one, started by torchrun)."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number; 0 if it is alone."""
    return dist.get_rank() if running() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if running() else 1


def is_main() -> bool:
    """Return whether this process writes and prints."""
    return rank() == 0


def from_main(value: T) -> T:
    """Return rank 0's value, which `gather` can send, on every rank."""
    return on_main(lambda: value)


def on_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone and return its result on every rank; an InputError is raised on every rank."""
    return cast(T, gather(lambda: work() if is_main() else None)[0])


def together(work: Callable[[], T]) -> T:
    """Do `work` on every rank and return each rank's own result; an InputError of any is raised on every rank."""
    return gather(work)[rank()]


def gather(work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and return the results of all, by rank, on each; an InputError of any is raised on all.

    Numbers, text and containers of them are sent; of anything else a rank gets its own, and None of the others.
    """
    if not running():
        return [work()]
    value, problem = None, None
    try:
        value = work()
    except InputError as error:
        problem = str(error)
    sent = value if isinstance(value, (int, float, str, bytes, list, tuple, dict)) else None
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, (sent, problem))
    problem = next((theirs for _, theirs in found if theirs is not None), None)
    if problem is not None:
        raise InputError(problem)
    results = [theirs for theirs, _ in found]
    results[rank()] = value
    return results


def sum_over_ranks(values: list[float]) -> list[float]:
    """Return the sums over all ranks, added in float64."""
    if not running():
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return cast("list[float]", total.tolist())


def check_agreement(facts: dict[str, Any]) -> None:
    """Raise InputError on every rank if facts (settings and versions, by name) are not the same everywhere."""
    everyone = gather(lambda: facts)
    for other, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise InputError(
                    f"rank {other} has {name}={theirs.get(name)!r}, rank 0 has {value!r}; "
                    "start all ranks with the same settings and versions"
                )


# --- parameters of which each rank holds a part (FSDP2: rows of dimension 0) ---


def is_sharded(tensor: object) -> TypeGuard[DTensor]:
    """Return whether each rank holds a part of a tensor, without loading what makes such tensors: 40 MB."""
    loaded = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def is_unit(module: nn.Module) -> bool:
    """Return whether `fully_shard` was called for a module, without loading it."""
    loaded = sys.modules.get("torch.distributed.fsdp")
    return loaded is not None and isinstance(module, loaded.FSDPModule)


def has_plain_type(tensor: Tensor) -> bool:
    """Return whether a tensor is of torch's own types; libraries that quantise have types of theirs."""
    return type(tensor._local_tensor if is_sharded(tensor) else tensor) in (Tensor, nn.Parameter)


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Within the `with` block the parameters of modules are whole, to be read, whichever unit shards them."""
    parts = dict.fromkeys(part for module in modules for part in module.modules())
    sharded: list[tuple[nn.Module, str, Any]]
    sharded = [(part, n, p) for part in parts for n, p in part._parameters.items() if is_sharded(p)]
    whole = {id(p): nn.Parameter(p.full_tensor()) for _, _, p in sharded}
    for module, name, parameter in sharded:
        module._parameters[name] = whole[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter


def reshard(model: nn.Module) -> None:
    """Put away the whole parameters that a forward pass leaves behind (by default those of `fully_shard`'s root)."""
    for module in model.modules():
        if is_unit(module):
            cast(Any, module).reshard()


def rows_here(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the part of a tensor that this rank holds, and which row of dimension 0 is its first.

    Raises InputError for a layout that we do not make: anything but rows over one dimension of ranks.
    """
    if not is_sharded(tensor):
        return tensor, 0
    from torch.distributed.tensor import Shard

    if len(tensor.placements) != 1 or tensor.placements[0] != Shard(0):
        raise InputError(f"a tensor is laid out as {tensor.placements}; shard with fully_shard over one mesh")
    mesh = tensor.device_mesh
    per_rank = -(-tensor.shape[0] // mesh.size())
    return tensor.to_local(), min(mesh.get_local_rank() * per_rank, tensor.shape[0])


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into one that may be sharded."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        # src_data_rank=None: every rank cuts its own part, nothing is sent.
        part = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(value)


@torch.no_grad()
def permute(tensor: Tensor, dim: int, perm: Tensor) -> None:
    """Reorder a tensor along `dim` in place: entry perm[i] becomes i. At most this one tensor is gathered for it."""
    if is_sharded(tensor) and any(each.is_shard(dim) for each in tensor.placements):
        whole = tensor.full_tensor()
        assign(tensor, whole.index_select(dim, perm.to(whole.device)))
    else:
        here = tensor.to_local() if is_sharded(tensor) else tensor
        here.copy_(here.index_select(dim, perm.to(here.device)))
