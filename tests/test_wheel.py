"""The wheel: it builds, holds everything, and works where the source tree is not."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = ["pyproject.toml", "README.md", "LICENSE"]
    for name in [
        *tracked,
        *(str(p.relative_to(ROOT)) for p in (ROOT / "switchable").rglob("*") if p.is_file()),
    ]:
        if "__pycache__" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_it_holds_every_module_and_the_type_marker(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "switchable").rglob("*.py")}
    tasks = {str(p.relative_to(ROOT)) for p in (ROOT / "switchable").rglob("*.yaml")}
    assert tasks
    assert modules | tasks | {"switchable/py.typed"} <= names
    assert "switchable = switchable.cli:main" in entry
    assert any(n.endswith("LICENSE") for n in names)


def test_it_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import switchable; from switchable.cli import main; "
        "assert switchable.__file__.startswith(sys.argv[1]), switchable.__file__; "
        "switchable.convert; sys.exit(main(['pretrain', '--num-experts', '10']))"
    )
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert "num_experts=10 does not divide" in done.stderr
