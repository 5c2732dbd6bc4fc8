"""Branch coverage of the rooms that read strangers' files and write outputs: recipe/, checkpoint/, engine/.

``python tests/branches.py [PYTEST ARGUMENTS]`` runs the suite (or what the arguments name) under coverage, with forked
workers and child processes counted, and prints the share of lines and branches for each room. It needs `coverage` 7.10.
Tests that limit processor time may fail under the tracing, which slows Python down several times; their lines count.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("recipe", "checkpoint", "engine")
LEAST = 95.0
SETTINGS = """\
[run]
branch = true
parallel = true
source = mergekit_lr.recipe, mergekit_lr.checkpoint, mergekit_lr.engine
data_file = {folder}/data
patch = subprocess, fork, _exit
disable_warnings = no-data-collected, module-not-measured, couldnt-parse
[report]
exclude_also =
    if TYPE_CHECKING:
    @overload
    \\.\\.\\.$
"""


def share(settings: Path, room: str, *more: str) -> tuple[float, str]:
    """Covered lines and branches of a room in per cent, and the report."""
    from coverage import Coverage
    from coverage.exceptions import NoDataError

    measured = Coverage(config_file=str(settings))
    measured.load()
    text = io.StringIO()
    include = [f"*/mergekit_lr/{r}/*" for r in (room, *more)]
    try:
        return measured.report(include=include, file=text, show_missing=True, skip_covered=True), text.getvalue()
    except NoDataError:
        return 0.0, "nothing of it was run\n"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="branches-") as folder:
        settings = Path(folder) / "settings"
        settings.write_text(SETTINGS.format(folder=folder))
        command = [sys.executable, "-m", "coverage"]
        suite = [*command, "run", f"--rcfile={settings}", "-m", "pytest", "-q", *arguments]
        status = subprocess.run(suite, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
        subprocess.run([*command, "combine", "-q", f"--rcfile={settings}"], cwd=ROOT, check=True)
        for room in ROOMS:
            print(f"\n{room}/: {share(settings, room)[0]:.1f} %\n{share(settings, room)[1]}")
        whole, _ = share(settings, *ROOMS)
        print(f"together: {whole:.2f} % of lines and branches")
        return status or whole < LEAST


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
