"""Where the ranks of one attempt meet, apart from those of attempts before it.

torchrun restarts its ranks with the key-value store they had, where gloo and NCCL look up addresses under the same keys
as before. A rank that is quicker than another finds the address of a dead process there, and waits for it. So the
ranks of an attempt first agree on a name that no other attempt had, and keep their keys under it:

    rank 0    makes up a name and announces it; waits for a word from every rank under that name; answers each word
    rank r    says a word of its own under the name announced; goes on when that very word is answered, else looks
              whether another name was announced meanwhile
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

ANNOUNCED = "switchable/meeting"
PATIENCE = 0.1  # seconds that a rank waits for its answer before it looks for another name


def meet(seconds: float) -> tuple[Store, int, int]:
    """Return a store of this attempt's own, this rank, and the number of ranks, from what torchrun set.

    RuntimeError or ValueError if the ranks did not meet within `seconds`, or the variables make no sense.
    """
    store, rank, world_size = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    return PrefixStore(agree(store, rank, world_size, seconds), store), rank, world_size


def agree(store: Store, rank: int, world_size: int, seconds: float) -> str:
    """Return a name that every rank of this attempt gets, and no other had; RuntimeError if they come too late."""
    word = uuid.uuid4().hex
    if rank == 0:
        return _lead(store, world_size, word, timedelta(seconds=seconds))
    return _follow(store, rank, word, seconds)


def _lead(store: Store, world_size: int, name: str, wait: timedelta) -> str:
    store.set(ANNOUNCED, name)
    if words := [f"{name}/word/{r}" for r in range(1, world_size)]:
        store.wait(words, wait)
    for key in words:
        store.set(f"{name}/answer/{store.get(key).decode()}", "")
    return name


def _follow(store: Store, rank: int, word: str, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        name = store.get(ANNOUNCED).decode()  # waits for one
        store.set(f"{name}/word/{rank}", word)
        time.sleep(PATIENCE)  # `wait` with a timeout would print a warning each time
        if store.check([f"{name}/answer/{word}"]):
            return name  # else rank 0 is slow, or this is the name of an attempt before
    raise RuntimeError(f"rank {rank} had no answer from rank 0 within {seconds:g} s")
