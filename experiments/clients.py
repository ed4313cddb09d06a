"""What nobody here wrote: every text model class of transformers, and every optimizer that is installed.

    python -m experiments.clients                            all of both; a line each, counts as JSON in the last line
    python -m experiments.clients --models [CLASS ...]       models only, or these
    python -m experiments.clients --models --write-table     all of them, to benchmarks/results and docs/families.md
    python -m experiments.clients --optimizers

Models are converted without a row in the table of families (`client_trial.py` says what is tried), optimizers go on
after a regrouping (`client_optimizers.py`). The exit code is 0 only if none is WRONG.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from typing import Any

from experiments import client_models, client_optimizers
from experiments.client_table import RESULTS, write_table


def main(argv: list[str] | None = None) -> int:
    """Try what is asked for; print a line each and the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", metavar="CLASS", help="models only, or only these classes")
    parser.add_argument("--optimizers", action="store_true", help="optimizers only")
    parser.add_argument("--write-table", action="store_true", help="write the results and docs/families.md")
    args = parser.parse_args(argv)
    if args.write_table and (args.models or args.optimizers):
        parser.error("--write-table is for all models")
    counts: dict[str, Any] = {}
    if args.models is not None or not args.optimizers:
        counts |= models(args.models or (), args.write_table)
    if args.optimizers or args.models is None:
        counts |= optimizers()
    print(json.dumps(counts))
    return 1 if any(each.get("WRONG") for each in counts.values()) else 0


def models(names: Any, write: bool) -> dict[str, Any]:
    """Try model classes; return the counts."""
    found = []
    for verdict in client_models.verdicts(names):
        found.append(verdict)
        print(client_models.line(verdict), flush=True)
    if write:
        results = client_models.results(found)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        write_table(results)
    return {"models": client_models.counts(found)}


def optimizers() -> dict[str, Any]:
    """Try optimizers; return the counts."""
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for name, build in client_optimizers.optimizers():
        verdict, why = client_optimizers.attempt(build)
        counts[verdict] += 1
        print(f"{verdict:12}  {name:45}  {why}", flush=True)
    return {"optimizers": {"optimizers": sum(counts.values()), **counts}}


if __name__ == "__main__":
    sys.exit(main())
