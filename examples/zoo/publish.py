"""Copy what the repository carries out of the build folder."""

from __future__ import annotations

import shutil

from zoo import COMMITTED, WORK

CARRIED = ("base", "python", "c", "german")
_LEFT_OUT = shutil.ignore_patterns("adam_exp_avg_sq.safetensors", "optimizer*")


def publish() -> None:
    """Replace ``examples/models/<name>`` by the folders just built, without optimizer states."""
    COMMITTED.mkdir(exist_ok=True)
    for name in CARRIED:
        if (WORK / name / "README.md").is_file():
            shutil.rmtree(COMMITTED / name, ignore_errors=True)
            shutil.copytree(WORK / name, COMMITTED / name, ignore=_LEFT_OUT)
    if (WORK / "LOSSES.json").is_file():
        shutil.copyfile(WORK / "LOSSES.json", COMMITTED / "LOSSES.json")
