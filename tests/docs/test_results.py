"""The tables in the docs are what benchmarks/render.py makes of the rows: nothing in them is typed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_rendered_files_are_up_to_date(tmp_path: Path) -> None:
    for name in ("benchmarks", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    subprocess.run([sys.executable, "benchmarks/render.py"], cwd=tmp_path, check=True)
    files = [p for p in (tmp_path / "README.md", *(tmp_path / "docs").rglob("*.md"))]
    stale = [str(p.relative_to(tmp_path)) for p in files if p.read_text() != (ROOT / p.relative_to(tmp_path)).read_text()]
    assert not stale, f"run python benchmarks/render.py: {stale}"
