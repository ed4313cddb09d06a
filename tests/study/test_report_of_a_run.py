"""What a run writes for its own report, and that all of it is escaped."""

from __future__ import annotations

import json
from pathlib import Path

from switchable.study.report import write_report
from switchable.study.result import Study


def test_the_monitor_measures_patterns_and_routes_live(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line["kind"] == "measure"]
    assert measured[0]["layers"][0]["pattern_similarity"] is None
    for line in measured[1:]:
        for layer in line["layers"]:
            assert 0.0 < layer["pattern_similarity"] <= 1.0
            assert 0.0 <= layer["routing_changed"] <= 1.0
            assert layer["dead"] + layer["always_on"] <= 1.0


def test_pretrain_writes_a_report_of_its_own(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    assert "Activation" in page
    assert "data:image/svg+xml;base64," in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_everything_shown_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&"
    study = Study(title=evil, config={evil: evil}, notes=[evil], problems=[evil], versions={evil: evil})
    write_report(study, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;") == 8
