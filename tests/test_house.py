"""How the package is built: imports run downwards, in no circle, and no room is too large."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "switchable"

FLOORS = (
    ("versions",),
    ("errors",),
    ("arrays", "options", "files", "timing", "ranks", "progress", "memory"),
    ("recipes", "gone", "finite"),
    ("settings",),
    ("data", "structure"),
    ("compute",),
    ("sections",),
    ("choices",),
    ("config",),
    ("ffn",),
    ("switching",),
    ("infer",),
    ("store",),
    ("train",),
    ("study",),
    ("evaluation", "adapt", "integrations"),
    ("compare", "finetune"),
    ("cli",),
    ("__init__", "__main__"),
)
"""From the ground up. What stands on one floor may import its own room and what is below."""

UPWARDS: dict[tuple[str, str], str] = {}
"""Arrows upwards that are meant, with their reason; at most two."""

LONGEST_FILE = 300
MOST_LINES = 27_500
"""What the package has now; lower it when code goes."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `switchable.`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inside if name.removeprefix("switchable.") in known} or {node.module}
    ours = {name.removeprefix("switchable.") for name in found if name.startswith("switchable.")}
    return ours | ({"__init__"} if "switchable" in found else set())


def test_imports_run_downwards() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    known = modules()
    wrong = []
    for name, path in known.items():
        for other in imports(path, known):
            here, there = name.split(".")[0], other.split(".")[0]
            if here != there and floor[there] >= floor[here] and (name, other) not in UPWARDS:
                wrong.append(f"{name} -> {other}")
    assert not wrong, "arrows upwards: " + ", ".join(sorted(wrong))
    assert len(UPWARDS) <= 2


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(path, known) - {name, "__init__"} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, "circle: " + " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_rooms_are_of_a_size_to_live_in() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    long = {name: count for name, count in lines.items() if count > LONGEST_FILE}
    assert not long, f"files over {LONGEST_FILE} lines: {long}"
    rooms: Counter[str] = Counter()
    for name, count in lines.items():
        rooms[name.split(".")[0]] += count
    (largest, most), *_ = rooms.most_common(1)
    assert most <= sum(lines.values()) / 4, f"{largest} is more than a quarter of the package"
    assert sum(lines.values()) <= MOST_LINES


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "experiments", "examples"])
def test_files_around_the_package_are_short_too(folder: str) -> None:
    counts = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert counts
    long = {name: count for name, count in counts.items() if count > LONGEST_FILE}
    assert not long, f"files over {LONGEST_FILE} lines: {long}"


def test_tests_have_one_thread_each_without_being_told() -> None:
    assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1")


def test_nothing_happens_at_import() -> None:
    script = (
        "import sys; before = list(sys.meta_path); import switchable; assert sys.meta_path == before; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
