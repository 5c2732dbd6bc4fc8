"""The example model zoo: the scripts that train every small model of the examples and benchmarks."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent
HELDOUT = EXAMPLES / "text" / "heldout"
COMMITTED = EXAMPLES / "models"
WORK = EXAMPLES / "zoo" / "build"
