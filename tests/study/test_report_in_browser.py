"""report.html in headless Chromium: no console errors, figures with a size, controls that work, fit for a phone.

No driver and no Python package is needed: a script appended to a copy of the page operates it and leaves what it found
in the document, which `--dump-dom` prints.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from switchable.study.measures import LayerStudy
from switchable.study.report import write_report
from switchable.study.result import LayerShape, Study

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=4000 --dump-dom"
)
LISTEN = "<script>window.problems = []; addEventListener('error', (e) => problems.push(e.message));</script>"
OPERATE = """
<script>
addEventListener("load", () => {
  const found = { problems, sizes: {}, width: document.documentElement.scrollWidth, wanted: innerWidth };
  const visible = (plot) => !plot.hidden && plot.getBoundingClientRect();
  const shown = (name) => [...document.querySelectorAll("#" + name + " .plot")].find(visible).dataset.layer;
  for (const figure of document.querySelectorAll("figure")) {
    const box = [...figure.querySelectorAll(".plot")].map(visible).find(Boolean);
    const image = figure.querySelector("img");
    found.sizes[figure.id] = [box.width, box.height, image.naturalWidth];
  }
  const select = document.getElementById("layer");
  found.layersBefore = [shown("similarity_pattern"), shown("mass")];
  select.value = "1";
  select.dispatchEvent(new Event("change"));
  found.layersAfter = [shown("similarity_pattern"), shown("mass")];
  const wide = [...document.querySelectorAll(".wide")];
  found.cutOff = wide.filter((box) => box.scrollWidth > box.clientWidth).length;
  found.folded = [...document.querySelectorAll("details")].map((each) => [each.open, each.innerText.trim()]);
  const plot = document.querySelector("#activation_ratio .plot");
  plot.scrollIntoView();
  const box = plot.getBoundingClientRect();
  const [x, y, text] = data.points[plot.dataset.plot][0];
  const at = { clientX: box.left + x * box.width + 3, clientY: box.top + y * box.height + 3 };
  plot.dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.getElementById("tip");
  found.tip = [tip.hidden, tip.textContent, text];
  plot.dispatchEvent(new PointerEvent("pointerleave"));
  found.tipAfter = tip.hidden;
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


def layer(ratio: float) -> LayerStudy:
    return LayerStudy(
        experts_per_token=2, takes_part=True,
        activation_ratio=ratio, ratio_quantiles=[ratio * f for f in (0.5, 0.8, 1.0, 1.2, 1.5)],
        dead=0.1, always_on=0.0, needed=ratio / 2,
        mass_best=[0.5, 0.8, 0.95, 1.0], mass_router=[0.4, 0.7, 0.9, 1.0], load=[0.4, 0.3, 0.2, 0.1],
        load_imbalance=1.6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    matrices = [np.clip(np.eye(4) + rng.random((4, 4)) * 0.5, 0, 1) for _ in range(2)]
    steps = (1, 10, 100, 1000)
    study = Study(
        title="runs/<b>x</b>",
        layers=[LayerShape(f"bert.encoder.layer.1{i}", 16, 64, 4, "relu") for i in range(2)],
        steps=list(steps),
        results=[[layer(0.5), layer(0.5 / (n + 1))] for n in range(4)],
        pairs=dict.fromkeys(("pattern", "coactivation"), matrices),
        config={"train.steps": 1000},
        metrics=[
            {"kind": "train", "step": s, "loss": 9.0 / s, "flops": 1e9 * s, "sparse_fraction": 0.5}
            for s in steps
        ],
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(study, path)
    return path


def browse(page: Path, tmp_path: Path, width: int = 1200) -> tuple[str, str]:
    """Open a page; return its final DOM, and what the browser said on the console."""
    profile = tmp_path / f"profile-{width}"
    arguments = [*FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},900", page.as_uri()]
    done = subprocess.run(
        [str(CHROMIUM), *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, console


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@needs_chromium
def test_it_loads_clean_has_figures_and_its_controls_work(report: Path, tmp_path: Path) -> None:
    page = report.read_text().replace("<head>", "<head>" + LISTEN).replace("</body>", OPERATE + "</body>")
    (tmp_path / "operated.html").write_text(page)
    dom, console = browse(tmp_path / "operated.html", tmp_path)
    assert console == ""
    match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert match, dom[:500]
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    assert found["problems"] == []
    assert {"loss", "activation_ratio", "similarity_pattern", "mass", "load"} <= found["sizes"].keys()
    for name, (width, height, natural) in found["sizes"].items():
        assert min(width, height) > 150, name
        assert natural > 100, name  # the image could be decoded
    assert found["layersBefore"] == ["mean", "0"]
    assert found["layersAfter"] == ["1", "1"]
    assert found["cutOff"] == 0  # the widest table fits the window
    assert found["folded"] == [[False, "Configuration"]]
    hidden, told, expected = found["tip"]
    assert (hidden, told, found["tipAfter"]) == (False, expected, True)
    assert told == "layer 0, step 1: 0.5"
    assert found["width"] <= found["wanted"]


@needs_chromium
def test_nothing_is_wider_than_a_phone(report: Path, tmp_path: Path) -> None:
    page = report.read_text()
    tell = "parent.postMessage(document.documentElement.scrollWidth, '*')"
    measure = f"<script>addEventListener('load', () => {tell});</script>"
    (tmp_path / "inner.html").write_text(page.replace("</body>", measure + "</body>"))
    (tmp_path / "phone.html").write_text(
        "<body><script>addEventListener('message', (e) => { document.title = 'width ' + e.data; });</script>"
        '<iframe src="inner.html" style="width:360px;height:740px;border:0"></iframe>'
    )
    dom, console = browse(tmp_path / "phone.html", tmp_path)
    assert console == ""
    width = re.search(r"<title>width (\d+)</title>", dom)
    assert width, dom[:200]
    assert int(width[1]) <= 360


@needs_chromium
def test_this_test_would_see_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<body><script>console.error('seen');</script>")
    _, console = browse(tmp_path / "bad.html", tmp_path)
    assert "seen" in console
