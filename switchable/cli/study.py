"""`switchable study`: what happens inside, over training: measures, pictures, report.html."""

from __future__ import annotations

import argparse
from pathlib import Path

from switchable.cli.flags import add_dataclass_flags, add_out, add_texts, given
from switchable.errors import InputError
from switchable.files import whole_folder, write_json

HELP = "measure activation over a run, a series of checkpoints or one model; pictures and report.html"


def add_arguments(verb: argparse.ArgumentParser) -> None:
    from switchable.study.config import StudyConfig

    what = "folder of a run, or of one model in Hugging Face form"
    verb.add_argument("folder", nargs="?", metavar="RUN", type=Path, help=what)
    series = "study these models as a series, e.g. out/step*"
    verb.add_argument("--checkpoints", nargs="+", metavar="DIR", help=series)
    add_out(verb, "folder for report.html, study.json and pictures/ (default: RUN/study, else ./study)")
    what = "text to measure on; default: the run's probe, or the Python installation's own source files"
    add_texts(verb, "text", what, nargs="*", metavar="FILE")
    verb.add_argument("--overwrite", action="store_true", help="replace the study in --out")
    add_dataclass_flags(verb, StudyConfig)
    verb.add_argument("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Measure, draw, and print where the report is, and what was found, as one JSON line."""
    if (args.folder is None) == (args.checkpoints is None):
        raise InputError("give either the folder of a run (or model), or a series with --checkpoints")
    from switchable.study.config import StudyConfig

    config = given(StudyConfig, args)
    # What a user can get wrong by typing is refused above, before torch is loaded.
    from switchable.cli.output import finish
    from switchable.progress import say
    from switchable.store.export import check_output
    from switchable.store.rundir import RunDir
    from switchable.study.findings import findings
    from switchable.study.pictures import write_files
    from switchable.study.report import write_report
    from switchable.study.study import study_checkpoints, study_run

    is_run = args.folder is not None and not (args.folder / "config.json").is_file()
    out = args.out or (args.folder / "study" if is_run else Path("study"))
    sources = RunDir(args.folder).contents() if is_run else args.checkpoints or [args.folder]
    check_output(out, args.overwrite, sources, "study", "study.json")
    if is_run:
        study = study_run(args.folder, config, not args.quiet)
    else:
        study = study_checkpoints(args.checkpoints or [str(args.folder)], config, not args.quiet)
    try:
        with whole_folder(out) as folder:
            names = write_files(study, folder / "pictures")
            write_json(folder / "study.json", study.to_json() | {"findings": findings(study)})
            write_report(study, folder / "report.html")
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"{out} cannot be written: {why}; choose another folder with --out") from None
    for problem in study.problems:
        say(f"switchable study: {problem}")
    report, sentences = out / "report.html", findings(study)
    found = {"report": str(report), "checkpoints": len(study.steps), "pictures": names, "findings": sentences}
    said = (*sentences, f"saved in {out}: report.html, study.json and pictures/")
    figures, then = found | {"problems": study.problems}, ("python", "-m", "webbrowser", report)
    finish(figures, out / "study.json", *said, then=then, show=not args.quiet)
    return 2 if study.problems else 0
