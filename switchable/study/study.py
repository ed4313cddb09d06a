"""A study from beginning to end: checkpoints -> one model at a time -> measures -> comparison -> `Study`.

study_run(folder)         a run of ours: its checkpoints, its own records, its configuration
study_checkpoints(list)   other checkpoints, a series or one model
records_of_run(folder)    only what a run wrote itself: what `pretrain` reports at its end, in no time
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from switchable.config import read_yaml
from switchable.errors import InputError
from switchable.files import read_json, read_records
from switchable.infer.precision import chosen_precision, multiplying_in
from switchable.progress import progress_bar, say
from switchable.store.find import trained_precision
from switchable.store.probe import Probe, load_probe, probe_from_text
from switchable.store.rundir import RunDir
from switchable.study.config import StudyConfig
from switchable.study.measures import EXACT_ZEROS, SAMPLED_TOKENS, measure_model
from switchable.study.result import Study
from switchable.study.series import Loader, find_tokenizer, listed_sources, run_sources
from switchable.study.similarity import MAX_NEURONS, compare_checkpoints, tokens_within
from switchable.train.setup import pick_device
from switchable.versions import versions

DEFAULT_TOKENS = 2048


def study_run(folder: Path, config: StudyConfig, progress: bool = False) -> Study:
    """Study a run of ours: its checkpoints and snapshots, and what it wrote itself.

    Raises InputError if it is no run, there is nothing to show at all, or the probe is unusable.
    """
    run = RunDir(folder)
    study = records_of_run(folder)
    if not run.summary.is_file():
        last = max((int(record["step"]) for record in study.metrics), default=0)
        so_far = f"it has written figures up to step {last}"
        study.problems.append(f"{folder} is not finished ({so_far}); shown is what there is so far")
    if not (sources := run_sources(run)):
        study.problems.append(f"{folder} has no checkpoints; shown is what the run itself has recorded")
        if not study.metrics:
            raise InputError(f"{folder} has neither checkpoints nor figures yet; try again later")
        return study
    return _fill(study, sources, config, run, progress)


def study_checkpoints(patterns: Sequence[str], config: StudyConfig, progress: bool = False) -> Study:
    """Study a list of checkpoint folders (or patterns), in the order of their steps.

    Raises InputError without a checkpoint that can be read, or for an unusable probe.
    """
    sources = listed_sources(patterns)
    return _fill(Study(", ".join(patterns), versions=_versions()), sources, config, None, progress)


def _versions() -> dict[str, str]:
    return versions() | {"python": platform.python_version()}


def records_of_run(folder: Path) -> Study:
    """Return what a run has recorded itself, without measuring anything; InputError if the folder is not a run's."""
    run = RunDir(folder)
    if not run.config.is_file():
        raise InputError(
            f"{folder} is not the folder of a run (no config.yaml); give one, or folders of models with --checkpoints"
        )
    sections = read_yaml(run.config)
    return Study(
        title=str(folder),
        metrics=read_records(run.metrics) if run.metrics.is_file() else [],
        summary=read_json(run.summary) if run.summary.is_file() else {},
        config={f"{s}.{k}": v for s, values in sections.items() for k, v in values.items()},
        versions=_versions(),
    )


def _fill(
    study: Study, sources: dict[int, Path], config: StudyConfig, run: RunDir | None, show: bool
) -> Study:
    """Measure the checkpoints one after another and compare them."""
    first, last = min(sources), max(sources)
    reach = f"steps {first:,} to {last:,}" if len(sources) > 1 else str(sources[last])
    say(f"study of {study.title}: {len(sources)} checkpoints ({reach})", show)
    loader = Loader(config.num_experts, config.experts_per_token, pick_device(config.device), show)
    probe: Probe | None = None
    patterns: list[Sequence[Tensor]] = []
    for step, path in progress_bar("measuring", "checkpoint", show=show, over=sources.items()):
        try:
            model = loader.load(path)
        except InputError as error:
            study.problems.append(f"left out: {error}")
            continue
        if probe is None:
            probe = _probe(config, run, sources[last], model)
            study.layers = loader.shape
            pattern_tokens = tokens_within(len(sources), sum(layer.d_ff for layer in study.layers))
            _describe(study, model, probe, pattern_tokens)
            precision = chosen_precision(model, config.precision, trained_precision(path))
            study.probe["precision"] = precision
            say(f"measured in {precision} on {probe.tokens:,} tokens: {probe.source}", show)
        with multiplying_in(model, precision):
            results, found = zip(*measure_model(model, probe, pattern_tokens), strict=True)
        study.steps.append(step)
        study.results.append(list(results))
        patterns.append(found)
    if not study.steps:
        raise InputError(f"none of {len(sources)} checkpoints can be studied; {study.problems[-1]}")
    if len(study.steps) > 1 and loader.orderless:
        study.problems.append(
            f"{loader.orderless[0]} does not tell which neuron is which (written by an older version), so checkpoints "
            "cannot be compared neuron by neuron"
        )
    elif len(study.steps) > 1:
        study.pairs = compare_checkpoints(patterns, [layer.d_ff for layer in study.layers], show)
    return study


def _probe(config: StudyConfig, run: RunDir | None, last: Path, model: PreTrainedModel) -> Probe:
    if run is not None and config.text is None:
        return load_probe(run.probe, config.probe_tokens)
    if model.main_input_name != "input_ids":
        raise InputError(f"{last} is a {type(model).__name__}, which reads no text; give a model of text")
    tokenizer = find_tokenizer(config.tokenizer, last)
    tokens = config.probe_tokens or DEFAULT_TOKENS
    return probe_from_text(config.text or (), tokenizer, model, tokens, config.sequence_length)


def _describe(study: Study, model: PreTrainedModel, probe: Probe, pattern_tokens: int) -> None:
    """Note what is measured on, and what the reader must know of the measures."""
    study.probe = {
        "tokens": probe.tokens,
        "sequence_length": probe.sequence_length,
        "text": probe.source,
        "model type": model.config.model_type,
    }
    if probe.tokens > pattern_tokens:
        study.notes.append(
            f"To bound memory, checkpoints are compared on {pattern_tokens:,} of the {probe.tokens:,} tokens at most."
        )
    if max(layer.d_ff for layer in study.layers) > MAX_NEURONS:
        study.notes.append(
            f"Co-activation matrices are compared on {MAX_NEURONS} neurons per layer, drawn once at random."
        )
    other = [layer.activation for layer in study.layers if layer.activation not in EXACT_ZEROS]
    if other:
        study.notes.append(
            f"{other[0]} is never exactly zero: a neuron counts as active on a token if it is among the fewest that "
            "give 99 % of the output (docs/measures.md)."
        )
    elif probe.tokens > SAMPLED_TOKENS:
        study.notes.append(
            f"The neurons needed for 99 % of the output are counted on about {SAMPLED_TOKENS} of the tokens."
        )
