"""A minute of coverage-guided fuzzing of each target."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.fuzz
@pytest.mark.parametrize("target", ["header", "recipe", "index"])
def test_guided(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "guided.py"), target, "-max_total_time=60", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.findall(r"Done (\d+) runs", done.stderr)
    assert runs and int(runs[-1]) > 1000, done.stderr[-3000:]
    print(f"{target}: {runs[-1]} executions")
