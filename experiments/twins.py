"""Does switching in pre-training cost anything after fine-tuning? A model and its dense twin on tasks of GLUE.

    python -m experiments.twins CONFIG --data TEXT --glue FOLDER [--tasks sst2 cola] [--seeds 0 1 2] [--out DIR]

For each seed both twins are pre-trained on the same text in the same order from the same weights; one switches, one
never does. Each is then fine-tuned in dense mode, with the same seed for head and order, and scored on the dev set by
the task's own metric: the SSD twin in both modes. What is finished is not trained again, what was interrupted goes on.

A difference is that of twins with the same seed, and its standard error that of such differences' mean over seeds. The
last line is one JSON document. Findings: docs/log/quality.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchable.cli.flags import default_cache
from switchable.config import RunConfig, load
from switchable.data.glue import TASKS
from switchable.errors import InputError

Scores = Mapping[str, Sequence[float | None]]
"""By `twin_mode`, one of `WAYS`: a score for each seed, None from a run that was never sparse."""
WAYS = ("dense_dense", "ssd_dense", "ssd_sparse")


def main(argv: list[str] | None = None) -> int:
    """Train what is not trained yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path, help="of the pre-training, e.g. configs/bert-wiki.yaml")
    parser.add_argument("--data", nargs="+", required=True, metavar="TEXT", help="English text")
    parser.add_argument("--glue", type=Path, required=True, metavar="FOLDER", help="GLUE's folder")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "cola"], choices=TASKS)
    parser.add_argument("--out", type=Path, default=Path("runs/twins"))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for token files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="two or more")
    parser.add_argument("--max-train-examples", type=int, default=16_000, metavar="N")
    parser.add_argument("--epochs", type=float, default=2.0)
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < 2:
        parser.error("--seeds: a standard error needs two or more")
    try:
        found = [(_twin(args, "dense", seed), _twin(args, "ssd", seed)) for seed in args.seeds]
    except InputError as error:
        print(f"experiments.twins: {error}", file=sys.stderr)
        return 2
    figures = {
        name: report({way: [pair[way.startswith("ssd")][name].get(way) for pair in found] for way in WAYS})
        for name in ("pretraining_loss", *args.tasks)
    }
    print("\n".join(table(figures)))
    print(json.dumps(figures | {"seeds": args.seeds}))
    return 0


def report(scores: Scores) -> dict[str, Any]:
    """Return the scores by seed, and how far each mode of the SSD twin is above its dense twin: mean, standard error.

    They are None for a mode that a run does not have.
    """
    figures: dict[str, Any] = {way: list(scores[way]) for way in WAYS}
    for way in WAYS[1:]:
        pairs = zip(scores[way], scores["dense_dense"], strict=True)
        above = [own - other for own, other in pairs if own is not None and other is not None]
        whole = len(above) == len(scores[way])
        figures[f"{way}_above"] = (
            {"mean": statistics.fmean(above), "stderr": statistics.stdev(above) / math.sqrt(len(above))}
            if whole
            else None
        )
    return figures


def table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines that say the same to a reader."""
    lines = [f"{'':17} {'dense twin':>10}   {'SSD, dense mode':>17}   {'SSD, sparse mode':>17}"]
    for name, each in figures.items():
        shown = "   ".join(f"{_shown(each[f'{way}_above']):>17}" for way in WAYS[1:])
        lines.append(f"{name:17} {statistics.fmean(each['dense_dense']):10.4f}   {shown}")
    return lines


def _shown(above: Mapping[str, float] | None) -> str:
    return "never sparse" if above is None else f"{above['mean']:+.4f} ± {above['stderr']:.4f}"


def _twin(args: argparse.Namespace, twin: str, seed: int) -> dict[str, dict[str, float]]:
    """Pre-train a twin and fine-tune it on every task: by the task's name and way, its metric."""
    values = {"data": args.data, "seed": seed} | ({"recipe": "dense"} if twin == "dense" else {})
    config = load(args.config, values)
    folder = args.out / f"{twin}-{seed}"
    if not (folder / "summary.json").exists():
        _pretrain(config, folder, args.cache)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    losses = {f"{twin}_{mode}": summary[f"val_loss_{mode}"] for mode in ("dense", "sparse")}
    return {"pretraining_loss": losses} | {
        task: _scores(args, config, twin, seed, task) for task in args.tasks
    }


def _scores(args: argparse.Namespace, config: RunConfig, twin: str, seed: int, task: str) -> dict[str, float]:
    from switchable.finetune.classify import finetune
    from switchable.finetune.config import FinetuneConfig

    out = args.out / f"{twin}-{seed}-{task}"
    if not (out / "results.json").exists():
        settings = FinetuneConfig(
            task=task,
            epochs=args.epochs,
            learning_rate=3e-4,  # a small model wants more than a large one
            max_length=64,
            max_train_examples=args.max_train_examples,
            seed=seed,
            threads=config.train.threads,
        )
        finetune(args.out / f"{twin}-{seed}", args.glue, settings, out, overwrite=True, quiet=True)
    result = json.loads((out / "results.json").read_text(encoding="utf-8"))
    metric = TASKS[task].metric
    return {f"{twin}_{each['mode']}": each["value"] for each in result["scores"] if each["metric"] == metric}


def _pretrain(config: RunConfig, folder: Path, cache: Path) -> None:
    from switchable.train.pretrain import pretrain, resume

    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob("step-*")):
        resume(folder, {}, cache)
    else:
        pretrain(config, folder, cache, overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
