"""What was found, as sentences made of numbers: loss and cost, sparsity, how the pattern changes, what experts catch.

The words follow the numbers: "sparse" is a mean activation ratio of at most 0.2, "early" the first third of the
checkpoints' span of steps, "settled" a Jaccard index of at least 0.9 between the last two. The first layer is told
apart from the others, because it behaves differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from switchable.study.measures import QUANTILES
from switchable.study.result import Series, Study

SPARSE = 0.2
EARLY = 1 / 3
SETTLED = 0.9


def findings(study: Study) -> list[str]:
    """Return up to three sentences; fewer where nothing was measured."""
    sentences = [_sparsity(study), _pattern(study) or _neurons(study), _experts(study)]
    return [sentence for sentence in sentences if sentence]


def headline(study: Study) -> str:
    """Return what the run ended with and what it cost, beside plain dense training; or where it stands; or nothing."""
    done = study.summary or next(reversed(study.records("eval")), {})
    losses = [(mode, done.get(f"val_loss_{mode}")) for mode in ("dense", "sparse")]
    told = " and ".join(f"{loss:.4f} in {mode} mode" for mode, loss in losses if loss is not None)
    if not study.summary:
        return f"So far: validation loss {told} at step {done['step']:,}." if told else ""
    return (
        f"Validation loss {told} ({done['loss_unit']}), for {done['flops_ratio']:.2f} of the FLOPs and "
        f"{done['wall_ratio']:.2f} of the time of as many plain dense steps."
    )


def _mean_series(series: Series, layers: list[int]) -> list[tuple[float, float]]:
    if not layers or not all(series[i][0] for i in layers):
        return []
    steps = series[layers[0]][0]
    return [(s, fmean([series[i][1][n] for i in layers])) for n, s in enumerate(steps)]


def _sparsity(study: Study) -> str:
    series = study.series("activation_ratio")
    layers = list(range(1, study.num_layers)) or list(range(study.num_layers))
    if not (points := _mean_series(series, layers)):
        return ""
    first_layer = f"; in the first layer {_percent(series[0][1][-1])}" if study.num_layers > 1 else ""
    whose = "the layers behind the first" if study.num_layers > 1 else "the layer"
    (step, ratio), (start, before) = points[-1], points[0]
    if len(points) == 1:
        verdict = "Activation is sparse" if ratio <= SPARSE else "Activation is not sparse"
        return f"{verdict}: a token activates {_percent(ratio)} of the neurons of {whose}{first_layer}."
    now = f"{_percent(ratio)} at step {step:,.0f}{first_layer}"
    history = f"a token activates {_percent(before)} of the neurons of {whose} at step {start:,.0f}"
    since = None  # the step from which on every value is at most SPARSE
    for s, value in reversed(points):
        if value > SPARSE:
            break
        since = s
    if since is None:
        return f"Activation is not sparse at the end: {history} and {now}."
    if since == start:
        return f"Activation is sparse from the first measurement on: {history} and {now}."
    early = " early" if since - start <= EARLY * (step - start) else ""
    reached = f"at most {SPARSE:.0%} from step {since:,.0f} on"
    return f"Activation becomes sparse{early} and stays so: {history}, {reached}, and {now}."


def _pattern(study: Study) -> str:
    if study.pairs:
        matrix, steps = study.mean_pairs("pattern"), study.steps
        last = float(matrix[-1, -2])
        between = f"between the last two checkpoints (steps {steps[-2]:,} and {steps[-1]:,})"
        first = f" and by {matrix[-1, 0]:.2f} between the first (step {steps[0]:,}) and the last"
        others = "" if len(steps) == 2 else first
    else:
        points = _mean_series(study.series("pattern_similarity"), list(range(study.num_layers)))
        if len(points) < 2:
            return ""
        last = points[-1][1]
        between = f"between the last two measurements (steps {points[-2][0]:,.0f} and {points[-1][0]:,.0f})"
        others = f", after {points[0][1]:.2f} between the first two (up to step {points[0][0]:,.0f})"
    verdict = "has settled" if last >= SETTLED else "is still changing at the end"
    return (
        f"The activation pattern {verdict}: the sets of neurons active on the same token overlap by {last:.2f} "
        f"(Jaccard index, mean over layers) {between}{others}."
    )


def _neurons(study: Study) -> str:
    if not study.results:
        return ""
    last = study.results[-1]
    dead, always = fmean([r.dead for r in last]), fmean([r.always_on for r in last])
    low = min(r.ratio_quantiles[QUANTILES.index(0.05)] for r in last)
    high = max(r.ratio_quantiles[QUANTILES.index(0.95)] for r in last)
    return (
        f"{_percent(dead)} of the neurons are active on no token of the probe and {_percent(always)} on all of them; "
        f"nine of ten tokens activate between {_percent(low)} and {_percent(high)} of a layer."
    )


def _experts(study: Study) -> str:
    """The experts of those layers that take part in sparse mode, each with its own K."""
    sparse = [r for r in study.results[-1] if r.takes_part] if study.results else []
    if study.results:
        rows = [(r.experts_per_token, len(r.load), r.mass_caught) for r in sparse]
    elif study.records("measure"):
        m = study.records("measure")[-1]
        each = zip(m["experts_per_token"], m["layers"], m["takes_part"], strict=True)
        rows = [(k, len(v["mass_by_k"]), v["mass_by_k"][k - 1]) for k, v, takes_part in each if takes_part]
        more = f" at step {m['step']:,}"
    else:
        return ""
    if not rows:
        return "No layer takes part in sparse mode."
    ks, experts, caught = zip(*rows, strict=True)
    share = fmean([k / e for k, e in zip(ks, experts, strict=True)])
    if sparse:
        best, busiest = fmean([r.mass_best_k for r in sparse]), max(r.load_imbalance for r in sparse)
        more = (
            f", where the best possible choice would catch {_percent(best)} and a random choice {_percent(share)}; "
            f"the busiest expert has {busiest:.1f} times the mean load"
        )
    return (
        f"{len(rows)} of {study.num_layers} layers take part in sparse mode: there the router's {spread(ks)} of "
        f"{experts[0]} experts ({_percent(share)} of the neurons) catch {_percent(fmean(caught))} of the activation "
        f"mass{more}."
    )


def spread(values: Sequence[int]) -> str:
    """Return whole numbers as `"17 to 19"`, or as one number if they are the same."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _percent(value: float) -> str:
    if value >= 0.1 or value == 0:
        return f"{value:.0%}"
    return f"{value:.1%}" if value >= 0.001 else "under 0.1%"
