"""Processes of their own, forked from a server that has loaded torch and transformers: a command, or several ranks.

A rank's exit code is what the command line's would be: 0, 2 for a wrong input, 128 + signal for a stop.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing as mp
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOAD = ["switchable.cli.pretrain", "switchable.train.pretrain", "train.test_loop", "launch"]


def start_ranks(
    world_size: int,
    work: Callable[..., int | None],
    *args: Any,
    per_rank: Sequence[Sequence[Any]] | None = None,
    log: Path,
) -> list[ForkServerProcess]:
    """Start `work(*args, *per_rank[r])` on every rank; what rank r prints on stderr goes to `log`/stderr-r."""
    context = _server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.mkdir(parents=True, exist_ok=True)
    extra = per_rank or [()] * world_size
    ranks = [
        context.Process(target=_rank, args=(r, world_size, port, str(log), work, (*args, *extra[r])))
        for r in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def run_ranks(
    world_size: int,
    work: Callable[..., int | None],
    *args: Any,
    per_rank: Sequence[Sequence[Any]] | None = None,
    log: Path,
    seconds: float = 120.0,
) -> list[tuple[int, str]]:
    """Run to the end; return exit code and stderr of every rank. One that does not end in time is killed: code -9."""
    ranks = start_ranks(world_size, work, *args, per_rank=per_rank, log=log)
    for process in ranks:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    errors = [(log / f"stderr-{r}").read_text() for r in range(world_size)]
    return [(int(process.exitcode or 0), error) for process, error in zip(ranks, errors, strict=True)]


def run_forked(
    work: Callable[..., int | None], *args: object, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do `work(*args)` in a folder, and return its exit code and what it said."""
    with tempfile.TemporaryDirectory() as said:
        process = _server().Process(target=_told, args=(said, str(folder), environment, work, args))
        process.start()
        process.join(600.0)
        process.kill()  # if it hangs
        process.join()
        out, err = (Path(said, name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(args, int(process.exitcode or 0), out, err)


def _server() -> ForkServerContext:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _told(
    said: str, folder: str, environment: dict[str, str], work: Callable[..., int | None], args: Any
) -> None:
    gc.freeze()  # what the server has loaded stays
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.update(environment)
    sys.exit(work(*args))


def _rank(r: int, world_size: int, port: int, log: str, work: Callable[..., int | None], args: Any) -> None:
    import torch

    gc.freeze()  # what the server has loaded stays
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(
            RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )  # fmt: skip
    with open(f"{log}/stderr-{r}", "w", buffering=1) as stream, contextlib.redirect_stderr(stream):
        faulthandler.dump_traceback_later(100, file=stream)  # a rank that is killed for hanging says where
        sys.exit(work(*args))


def cli(*arguments: str) -> int:
    """The command line, in this process."""
    from switchable.cli import main

    return main(list(arguments))


def script(path: str, *arguments: str) -> None:
    """`python path arguments`, in this process."""
    sys.argv, sys.path[0] = [path, *arguments], str(Path(path).parent)
    runpy.run_path(path, run_name="__main__")
