"""Python files in an output, against the digests that its report states. They are read as bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.small_files import read_plain
from mergekit_lr.engine.code_files import LARGEST
from mergekit_lr.errors import CheckpointError


def code_problems(folder: Path, report: Any) -> list[str]:
    """What is wrong with the files under ``code`` of a report, in words; one that it does not list is no problem."""
    entries = report.get("code") if isinstance(report, dict) else None
    if entries is None:
        return []
    if not isinstance(entries, list):
        return ["merge_report.json has a `code` that is no list"]
    problems = []
    for entry in entries:
        name, digest = (entry.get("file"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(digest, str):
            problems.append("merge_report.json has an entry under `code` without file or sha256")
            continue
        try:
            found = hashlib.sha256(read_plain(folder, name, most=LARGEST)).hexdigest()
        except CheckpointError as e:
            problems.append(f"the code {name[:80]!r} cannot be checked: {e.why or e.what}")
            continue
        if found != digest:
            problems.append(f"the code {name!r} is not as it was written: do not run it")
    return problems
