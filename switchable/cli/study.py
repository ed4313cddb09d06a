"""`switchable study`: what happens inside, over training: measures, pictures, report.html."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from switchable.cli.flags import RESERVED, add_dataclass_flags, given_flags
from switchable.errors import InputError

HELP = "measure activation over a run, a series of checkpoints or one model; pictures and report.html"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    from switchable.study.config import StudyConfig

    what = "folder of a run, or of one model in Hugging Face form"
    verb.add_argument("folder", nargs="?", metavar="RUN", type=Path, help=what)
    verb.add_argument(
        "--checkpoints", nargs="+", metavar="DIR", help="study these models as a series, e.g. out/step*"
    )
    verb.add_argument(
        "--out",
        type=Path,
        help="folder for report.html, study.json and pictures/ (default: RUN/study, else ./study)",
    )
    verb.add_argument(
        "--text",
        dest=f"{RESERVED}text",
        nargs="*",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="text to measure on; default: the run's probe, or the Python installation's own source files",
    )
    add_dataclass_flags(verb, StudyConfig)
    verb.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Measure, draw, and print where the report is, and what was found, as one JSON line."""
    if (args.folder is None) == (args.checkpoints is None):
        raise InputError("give either the folder of a run (or model), or a series with --checkpoints")
    from switchable.coercion import build
    from switchable.study.config import StudyConfig

    config = build(StudyConfig, given_flags(args), "the flags")
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.files import as_json, write_json
    from switchable.study.findings import findings
    from switchable.study.pictures import write_files
    from switchable.study.report import write_report
    from switchable.study.study import study_checkpoints, study_run

    progress = sys.stderr.isatty() and not args.quiet
    is_run = args.folder is not None and not (args.folder / "config.json").is_file()
    out = args.out or (args.folder / "study" if is_run else Path("study"))
    if is_run:
        study = study_run(args.folder, config, progress)
    else:
        study = study_checkpoints(args.checkpoints or [str(args.folder)], config, progress)
    try:
        names = write_files(study, out / "pictures")
        write_json(out / "study.json", study.to_json())
        write_report(study, out / "report.html")
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {error.strerror}; choose another folder with --out"
        ) from None
    found = {"report": str(out / "report.html"), "checkpoints": len(study.steps), "pictures": names}
    print(as_json(found | {"findings": findings(study), "problems": study.problems}))
    for problem in study.problems:
        print(f"switchable study: {problem}", file=sys.stderr)
    return 2 if study.problems else 0
