"""The table of held-out losses: every language model of the zoo on every domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo import COMMITTED, WORK, models
from zoo.runs import DENSE
from zoo.sources import DOMAINS
from zoo.text import read_manifest
from zoo.train import WINDOW


def folder_of(name: str) -> Path:
    """The folder built here, else the committed one."""
    return WORK / name if (WORK / name / "README.md").is_file() else COMMITTED / name


def write(path: Path) -> None:
    """Measure every dense model and write ``{"models": {name: {domain: nats per token}}}``."""
    table: dict[str, Any] = {}
    for name in DENSE:
        if (folder_of(name) / "config.json").is_file():
            table[name] = {d: round(v, 5) for d, v in models.losses(models.load(folder_of(name))).items()}
    manifest = read_manifest()
    document = {
        "unit": "nats per token",
        "window": WINDOW,
        "text": {domain: manifest[domain]["sha256"] for domain in DOMAINS},
        "models": table,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
