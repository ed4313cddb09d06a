"""`switchable study`: what happens inside, over training: measures, pictures, report.html."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from switchable.errors import InputError

HELP = "measure activation over a run, a series of checkpoints or one model; pictures and report.html"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    verb.add_argument(
        "folder",
        nargs="?",
        metavar="RUN",
        type=Path,
        help="folder of a run, or of one model in Hugging Face form",
    )
    verb.add_argument(
        "--checkpoints", nargs="+", metavar="DIR", help="study these models as a series, e.g. out/step*"
    )
    verb.add_argument(
        "--out",
        type=Path,
        help="folder for report.html, study.json and pictures/ (default: RUN/study, else ./study)",
    )
    verb.add_argument(
        "--text", nargs="*", metavar="FILE",
        help="text to measure on; default: the run's probe, or the Python installation's own source files",
    )  # fmt: skip
    verb.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="the models' tokenizer, if it is not with them"
    )
    verb.add_argument(
        "--probe-tokens",
        type=int,
        metavar="N",
        help="tokens to measure on (default: the run's probe, or 2048)",
    )
    verb.add_argument(
        "--sequence-length",
        type=int,
        default=256,
        metavar="N",
        help="tokens per sequence of --text (default %(default)s)",
    )
    verb.add_argument(
        "--num-experts", type=int, metavar="E", help="experts for models without any (default: near 32)"
    )
    verb.add_argument(
        "--experts-per-token",
        type=int,
        metavar="K",
        help="experts per token (default: the run's, or 3/16 of them)",
    )
    verb.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    verb.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Measure, draw, and print where the report is, and what was found, as one JSON line."""
    if (args.folder is None) == (args.checkpoints is None):
        raise InputError("give either the folder of a run (or model), or a series with --checkpoints")
    for name in ("probe_tokens", "sequence_length", "num_experts", "experts_per_token"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value} is out of range; use a whole number of at least 1")
    from switchable.files import write_json
    from switchable.study.findings import findings
    from switchable.study.pictures import write_files
    from switchable.study.report import write_report
    from switchable.study.study import StudySettings, study_checkpoints, study_run
    from switchable.train.setup import pick_device

    settings = StudySettings(
        text=None if args.text is None else tuple(args.text),
        tokenizer=args.tokenizer,
        probe_tokens=args.probe_tokens,
        sequence_length=args.sequence_length,
        num_experts=args.num_experts,
        experts_per_token=args.experts_per_token,
        device=pick_device(args.device),
        progress=sys.stderr.isatty() and not args.quiet,
    )
    is_run = args.folder is not None and not (args.folder / "config.json").is_file()
    out = args.out or (args.folder / "study" if is_run else Path("study"))
    if is_run:
        study = study_run(args.folder, settings)
    else:
        study = study_checkpoints(args.checkpoints or [str(args.folder)], settings)
    try:
        names = write_files(study, out / "pictures")
        write_json(out / "study.json", study.to_json())
        write_report(study, out / "report.html")
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {error.strerror}; choose another folder with --out"
        ) from None
    found = findings(study)
    print(
        json.dumps(
            {
                "report": str(out / "report.html"),
                "checkpoints": len(study.steps),
                "pictures": names,
                "findings": found,
                "problems": study.problems,
            }
        )
    )
    for problem in study.problems:
        print(f"switchable study: {problem}", file=sys.stderr)
    return 2 if study.problems else 0
