"""Settings for every suite."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports triton (torch and transformers do): its own functions are bound to the interpreter or to the
# compiler when it is imported. Where there is a GPU the kernels are compiled.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

# In CI a property test draws the same examples every time: a failure there must be due to the change. Everywhere else
# they are drawn afresh, which is how new ones are found.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
