"""One call of the command line for `experiments.fuzz`, in a process forked from one that has imported everything."""

from __future__ import annotations

import os
import resource
import sys

import torch

from switchable.adapt.run import adapt  # noqa: F401 - what verbs import when they run is imported once, here
from switchable.cli import main
from switchable.evaluation.run import evaluate  # noqa: F401
from switchable.finetune.classify import finetune  # noqa: F401
from switchable.study.report import write_run_report  # noqa: F401
from switchable.train.pretrain import pretrain  # noqa: F401

MEMORY = 16 * 2**30
"""Address space of a process, bytes."""


def attempt(arguments: list[str], place: str) -> None:
    """In a process of its own: the command line, what it says going into files."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT), number)
    code = main(arguments)
    sys.stdout.flush()
    sys.exit(code)
