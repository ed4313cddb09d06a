"""Every text model class of transformers through `client_trial.py`, each in a process and a time of its own.

Not counted are those whose config cannot be built tiny, those that have no FFN or another activation than ReLU whatever
the config says, and mixtures of experts, whose FFNs are experts already. Of the rest, `share_working` are converted.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers

from experiments.client_build import classes
from experiments.client_trial import Verdict, attempt

SECONDS = 120
"""That one class may take."""
COUNTED = ("works", "refused", "WRONG")


def verdicts(names: Sequence[str] = ()) -> Iterator[Verdict]:
    """Yield what becomes of each class, or of those named; none of them can end the rest."""
    warnings.simplefilter("ignore")
    with_quiet = transformers.utils.logging
    with_quiet.set_verbosity_error()
    with_quiet.disable_progress_bar()
    torch.set_num_threads(1)
    for name, kind in classes().items():
        if not names or name in names:
            yield in_its_own_process(name, kind)


def in_its_own_process(name: str, kind: Any) -> Verdict:
    """Try one class; WRONG where the process dies or does not end in time."""
    context = multiprocessing.get_context("fork")  # transformers has been imported once
    answers = context.Queue()
    process = context.Process(target=_answer, args=(answers, name, kind))
    process.start()
    end, verdict = time.monotonic() + SECONDS, None
    while verdict is None and time.monotonic() < end:
        alive = process.is_alive()
        try:
            verdict = answers.get(timeout=0.5)
        except queue.Empty:
            if not alive:
                break
    if verdict is None:
        process.kill()
        told = "not done in time" if time.monotonic() >= end else f"ended with exit code {process.exitcode}"
        verdict = Verdict(name, "WRONG", told)
    process.join()
    return verdict


def _answer(answers: Any, name: str, kind: Any) -> None:
    try:
        answers.put(attempt(name, kind))
    except Exception as error:  # noqa: BLE001 - any error at all is the verdict
        answers.put(Verdict(name, "WRONG", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]))


def line(verdict: Verdict) -> str:
    """Return what is printed of a class."""
    worst = max(verdict.figures.values(), default=0.0)
    did = f"{verdict.ffns} FFNs, {verdict.form}; at most {worst:.1e} apart" if verdict.ffns else ""
    return f"{verdict.verdict:12}  {verdict.model:45}  {' '.join(filter(None, (did, verdict.why)))[:220]}"


def counts(found: Sequence[Verdict]) -> dict[str, Any]:
    """Return how many classes there are of each verdict, and the share of those counted that work."""
    each = Counter(verdict.verdict for verdict in found)
    counted = sum(each[name] for name in COUNTED)
    share = each["works"] / counted if counted else None
    return {"models": len(found), **dict(sorted(each.items())), "share_working": share and round(share, 4)}


def results(found: Sequence[Verdict]) -> dict[str, Any]:
    """Return what is kept of a whole run."""
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "counts": counts(found),
        "models": [asdict(verdict) for verdict in found],
    }
