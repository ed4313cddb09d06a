"""Does switching in pre-training cost anything after fine-tuning? A BERT and its dense twin on SST-2.

    python -m experiments.bert_twins --data TEXT --glue FOLDER [--out DIR] [--seeds 0 1 2]

Both twins are pre-trained on the same text in the same order from the same weights; one switches,
one never does. Each is then fine-tuned on SST-2 in dense mode, with every seed of head and order, and scored on the
dev set: the SSD twin in both modes. What is finished is not trained again, what was interrupted goes on.

The standard error of a difference is that of paired examples being unknown, so the larger, unpaired one:
sqrt(s1² + s2²), s being the standard error of the mean accuracy over seeds on the 872 examples (that of the examples;
seeds share them and do not make it smaller). The last line is one JSON document. Findings: docs/log/quality.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from switchable.cli.flags import default_cache
from switchable.config import RunConfig, load
from switchable.errors import InputError

CONFIG = Path(__file__).parents[1] / "configs" / "bert-wiki.yaml"
TWINS = ("ssd", "dense")


def main(argv: list[str] | None = None) -> int:
    """Train what is not trained yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", nargs="+", required=True, metavar="TEXT", help="English text")
    parser.add_argument("--glue", type=Path, required=True, metavar="FOLDER", help="GLUE's folder")
    parser.add_argument("--config", type=Path, default=CONFIG, help="configuration (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/bert-twins"))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for token files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of fine-tuning")
    parser.add_argument("--max-train-examples", type=int, default=16_000, metavar="N")
    parser.add_argument("--epochs", type=float, default=2.0)
    args = parser.parse_args(argv)
    try:
        found = {twin: _twin(args, twin) for twin in TWINS}
    except InputError as error:
        print(f"experiments.bert_twins: {error}", file=sys.stderr)
        return 2
    figures = report(found)
    print("\n".join(table(figures)))
    print(json.dumps(figures | {"seeds": args.seeds}))
    return 0


def report(found: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Return each twin's accuracy and its standard error by mode (None: never sparse), and the difference."""
    figures: dict[str, Any] = {
        f"{twin}_{mode}": _mean(
            [score for scores in found[twin] for score in scores if score["mode"] == mode]
        )
        for twin, mode in (("ssd", "dense"), ("ssd", "sparse"), ("dense", "dense"))
    }
    dense, ssd = figures["dense_dense"], figures["ssd_dense"]
    difference = ssd["accuracy"] - dense["accuracy"]
    return figures | {"difference": difference, "stderr": math.hypot(dense["stderr"], ssd["stderr"])}


def table(figures: dict[str, Any]) -> list[str]:
    """Return the lines that say the same to a reader."""
    lines = [f"{'twin':6} {'mode':7} SST-2 accuracy"]
    for key in ("ssd_dense", "ssd_sparse", "dense_dense"):
        twin, mode = key.split("_")
        found = figures[key]
        shown = (
            "— (the run was never sparse)"
            if found is None
            else f"{found['accuracy']:.4f} ± {found['stderr']:.4f}"
        )
        lines.append(f"{twin:6} {mode:7} {shown}")
    return [*lines, f"SSD - dense: {figures['difference']:+.4f} ± {figures['stderr']:.4f}"]


def _twin(args: argparse.Namespace, twin: str) -> list[list[dict[str, Any]]]:
    """Pre-train a twin and fine-tune it with every seed: its accuracies, one list per seed."""
    from switchable.finetune.classify import finetune
    from switchable.finetune.config import FinetuneConfig

    config = load(args.config, {"data": args.data} | ({"recipe": "dense"} if twin == "dense" else {}))
    folder = args.out / twin
    if not (folder / "summary.json").exists():
        _pretrain(config, folder, args.cache)
    found = []
    for seed in args.seeds:
        out = args.out / f"{twin}-sst2-{seed}"
        if not (out / "results.json").exists():
            settings = FinetuneConfig(
                "sst2",
                epochs=args.epochs,
                learning_rate=3e-4,  # a small model wants more than a large one
                max_length=64,
                max_train_examples=args.max_train_examples,
                seed=seed,
                threads=config.train.threads,
            )
            finetune(folder, args.glue, settings, out, overwrite=True, quiet=True)
        result = json.loads((out / "results.json").read_text(encoding="utf-8"))
        found.append([score for score in result["scores"] if score["metric"] == "accuracy"])
    return found


def _pretrain(config: RunConfig, folder: Path, cache: Path) -> None:
    from switchable.train.pretrain import pretrain, resume

    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob("step-*")):
        resume(folder, {}, cache)
    else:
        pretrain(config, folder, cache, overwrite=True)


def _mean(scores: list[dict[str, Any]]) -> dict[str, float] | None:
    """Return the mean accuracy over seeds and its standard error on the examples; None if there are no scores."""
    if not scores:
        return None
    value = statistics.fmean(score["value"] for score in scores)
    return {"accuracy": value, "stderr": math.sqrt(value * (1 - value) / scores[0]["examples"])}


if __name__ == "__main__":
    sys.exit(main())
