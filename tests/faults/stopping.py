"""Runs `driver` in a process of its own and says what it counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).with_name("driver.py")


def run(job: str, work: Path, timeout: int = 600, **options: Any) -> dict[str, Any]:
    """Stop ``job`` as ``options`` say (see `driver.main`); what happened how often."""
    work.mkdir(exist_ok=True)
    command = [sys.executable, str(DRIVER), job, str(work), json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))  # shown with -rP
    return found
