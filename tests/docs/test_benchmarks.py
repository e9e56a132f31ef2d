"""Every benchmark script starts: its imports, and its arguments, are whole."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SHARED = {"answering.py", "foreign.py", "ladder.py", "speed_tables.py", "tables.py"}  # no scripts
NO_ARGUMENTS = {"render.py", "llama_cpp_worker.py", "openvino_worker.py", "onnxruntime_worker.py"}


@pytest.mark.parametrize("script", sorted(p.name for p in FOLDER.glob("*.py") if p.name not in SHARED | NO_ARGUMENTS))
def test_help(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert ended.value.code == 0 and script in capsys.readouterr().out
