"""A study from beginning to end: checkpoints -> one model at a time -> measures -> comparison -> `Study`.

study_run(folder)         a run of ours: its checkpoints, its own records, its configuration
study_checkpoints(list)   other checkpoints, a series or one model
records_of_run(folder)    only what a run wrote itself: what `pretrain` reports at its end, in no time
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import nn

from switchable.config import read_yaml
from switchable.errors import InputError
from switchable.ffn.convert import layers_of
from switchable.files import read_json, read_records
from switchable.infer.precision import chosen_precision, multiplying_in
from switchable.progress import progress_bar, say
from switchable.store.find import trained_precision
from switchable.store.probe import Probe, load_probe, probe_from_text
from switchable.store.rundir import RunDir
from switchable.study.config import StudyConfig
from switchable.study.measures import EXACT_ZEROS, SAMPLED_TOKENS, Fingerprint, measure_model
from switchable.study.result import LayerShape, Study
from switchable.study.series import (
    Loader,
    Skipped,
    Source,
    find_tokenizer,
    listed_sources,
    order_is_known,
    run_sources,
)
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
    sources = run_sources(run)
    if not sources:
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


def _fill(study: Study, sources: list[Source], config: StudyConfig, run: RunDir | None, show: bool) -> Study:
    """Measure the checkpoints one after another and compare them."""
    reach = f"steps {sources[0].step:,} to {sources[-1].step:,}" if len(sources) > 1 else str(sources[0].path)
    say(f"study of {study.title}: {len(sources)} checkpoints ({reach})", show)
    loader = Loader(config.num_experts, config.experts_per_token, pick_device(config.device), show)
    probe: Probe | None = None
    fingerprints: list[list[Fingerprint]] = []
    pattern_tokens = 0
    read: list[Source] = []
    for source in progress_bar("measuring", "checkpoint", show=show, over=sources):
        try:
            model = loader.load(source)
        except Skipped as skipped:
            study.problems.append(f"left out: {skipped}")
            continue
        if probe is None:
            probe = _probe(config, run, sources, model)
            pattern_tokens = tokens_within(len(sources), sum(layer.ssd.d_ff for layer in layers_of(model)))
            _describe(study, model, probe, pattern_tokens)
            precision = chosen_precision(model, config.precision, trained_precision(source.path))
            study.probe["precision"] = precision
            say(f"measured in {precision} on {probe.tokens:,} tokens: {probe.source}", show)
        with multiplying_in(model, precision):
            results, prints = zip(*measure_model(model, probe, pattern_tokens), strict=True)
        study.steps.append(source.step)
        study.results.append(list(results))
        fingerprints.append(list(prints))
        read.append(source)
    if not read:
        raise InputError(f"none of {len(sources)} checkpoints can be studied; {study.problems[-1]}")
    if len(read) > 1:
        unknown = [source for source in read if not order_is_known(source)]
        if unknown:
            study.problems.append(
                f"{unknown[0].path} does not tell which neuron is which (written by an older version), so checkpoints "
                "cannot be compared neuron by neuron"
            )
        else:
            study.pairs = compare_checkpoints(fingerprints, show)
    return study


def _probe(config: StudyConfig, run: RunDir | None, sources: Sequence[Source], model: nn.Module) -> Probe:
    if run is not None and config.text is None:
        return load_probe(run.probe, config.probe_tokens)
    tokenizer = find_tokenizer(config.tokenizer, sources)
    tokens = config.probe_tokens or DEFAULT_TOKENS
    return probe_from_text(config.text or (), tokenizer, model, tokens, config.sequence_length)


def _describe(study: Study, model: nn.Module, probe: Probe, pattern_tokens: int) -> None:
    layers = [layer.ssd for layer in layers_of(model)]
    names = [f.name for f in fields(LayerShape) if f.name != "activation"]
    study.layers = [
        LayerShape(**{name: getattr(ssd, name) for name in names}, activation=ssd.settings.activation)
        for ssd in layers
    ]
    study.probe = {
        "tokens": probe.tokens,
        "sequence_length": probe.sequence_length,
        "text": probe.source,
        "model type": cast(Any, model).config.model_type,
    }
    other = [shape.activation for shape in study.layers if shape.activation not in EXACT_ZEROS]
    notes = {
        f"To bound memory, checkpoints are compared on {pattern_tokens:,} of the {probe.tokens:,} tokens at most.": (
            probe.tokens > pattern_tokens
        ),
        f"Co-activation matrices are compared on {MAX_NEURONS} neurons per layer, drawn once at random.": (
            max(shape.d_ff for shape in study.layers) > MAX_NEURONS
        ),
        f"The neurons needed for 99 % of the output are counted on about {SAMPLED_TOKENS} of the tokens.": (
            not other and probe.tokens > SAMPLED_TOKENS
        ),
        f"{study.layers[0].activation} is never exactly zero: a neuron counts as active on a token if it is "
        "among the fewest that give 99 % of the output (docs/measures.md).": bool(other),
    }
    study.notes += [note for note, holds in notes.items() if holds]
