"""One picture for all places: PNG and SVG files, and an image in the report whose points tell their values.

A picture is a matplotlib figure plus hover points: a place in it and what is to be read there. Colours are ordered by
lightness and lines differ by marker too, so that pictures can be read in grey and by colour-blind eyes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.markers import CARETDOWNBASE
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from switchable.files import whole_file

MARKERS = "osD^vPX*<>"
DENSE, SPARSE, TRAIN = "#00334e", "#d55e00", "#9aa5ad"
PANEL_INCHES = (4.4, 3.3)  # width and height of a panel: its text is still legible on a phone's width
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "switchable", "font.size": 10.0, "axes.titlesize": 10.0}
PNG_DPI = 150


@dataclass
class Picture:
    """A figure and what can be read at its points."""

    figure: Figure
    points: list[tuple[Axes, float, float, str]] = field(default_factory=list)

    def hover(self, axes: Axes, x: float, y: float, text: str) -> None:
        """Tell `text` at a point, in the coordinates of the data."""
        self.points.append((axes, x, y, text))

    def line(
        self, axes: Axes, xs: Sequence[float], ys: Sequence[float], text: Callable[[Any, Any], str], **style: Any,
    ) -> None:  # fmt: skip
        """Draw a line that tells `text(x, y)` at each of its points."""
        axes.plot(xs, ys, **style)
        for x, y in zip(xs, ys, strict=True):
            self.hover(axes, x, y, text(x, y))


Draw = Callable[[Picture, Axes], None]


def draw_picture(panels: Sequence[Draw], columns: int = 1) -> Picture:
    """Draw panels into a grid of `columns` columns."""
    with mpl.rc_context(STYLE):
        rows = math.ceil(len(panels) / columns)
        size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
        figure = Figure(figsize=size, dpi=72, layout=(layout := ConstrainedLayoutEngine()))
        FigureCanvasAgg(figure)
        picture = Picture(figure)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, draw in zip(grid.flat, panels, strict=False):
            draw(picture, axes)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        # Laid out once, for all files: hover points lie where they are drawn, and drawing takes a third of the time.
        layout.execute(figure)
        figure.set_layout_engine(None)
        return picture


def write_picture(picture: Picture, path: Path) -> None:
    """Write a picture, as what the name ends in says, completely or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(_rendered(picture, path.suffix[1:]))


def embedded(picture: Picture) -> dict[str, Any]:
    """Return what the report needs: the image as a data URI, its size, and its hover points.

    A point is `[x, y, text]`, x and y being fractions of the image's width and height from the top left.
    """
    image = base64.b64encode(_rendered(picture, "svg")).decode("ascii")
    width, height = map(float, picture.figure.get_size_inches() * picture.figure.dpi)
    points = []
    for axes, x, y, text in picture.points:
        across, up = map(float, axes.transData.transform((x, y)))
        points.append([round(across / width, 4), round(1 - up / height, 4), text])
    source = f"data:image/svg+xml;base64,{image}"
    return {"src": source, "width": round(width), "height": round(height), "points": points}


def _rendered(picture: Picture, kind: str) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"dpi": PNG_DPI} if kind == "png" else {"dpi": 72, "metadata": {"Date": None}}
    with mpl.rc_context(STYLE):
        picture.figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def step_axis(axes: Axes, steps: Sequence[float], regrouped: Sequence[float] = ()) -> None:
    """Make the x axis of plain axes one of optimizer steps, logarithmic where that says more; mark regroupings."""
    plain_axes(axes)
    mark_regroupings(axes, regrouped)
    positive = [s for s in steps if s > 0]
    if len(positive) <= 2 or max(positive) / min(positive) <= 8:
        axes.set_xlabel("optimizer step")
        margin = 0.05 * (max(steps) - min(steps)) or 1
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
        return
    linear = {} if min(steps) > 0 else {"linthresh": min(positive)}  # a logarithmic axis has no 0
    axes.set_xscale("symlog" if linear else "log", **linear)
    wide = max(positive) / min(positive) > 300
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("optimizer step (log scale)")
    axes.set_xlim(0 if linear else 0.9 * min(positive), 1.1 * max(positive))


def mark_regroupings(axes: Axes, places: Sequence[float]) -> None:
    """Mark places on the x axis, along the upper edge, where a layer was regrouped."""
    if places:
        style: Any = {"ls": "", "marker": CARETDOWNBASE, "ms": 6, "color": SPARSE, "label": "regrouping"}
        axes.plot(places, [1.0] * len(places), transform=axes.get_xaxis_transform(), clip_on=False, **style)


def plain_axes(axes: Axes) -> None:
    """A light grid, no box."""
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


LEGEND_ABOVE: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "fontsize": 8, "frameon": False}
LEGEND_ABOVE |= {"borderaxespad": 0.5, "columnspacing": 0.7, "handlelength": 1.3, "handletextpad": 0.4}


def legend_above(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, ncols=min(5, len(handles)), **LEGEND_ABOVE)
