"""The table of held-out losses: every language model of the zoo on every domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo import COMMITTED, WORK, models
from zoo.runs import ADAPTERS, DENSE, MIXTURES
from zoo.sources import DOMAINS
from zoo.text import read_manifest
from zoo.train import WINDOW


def folder_of(name: str) -> Path:
    """The folder built here, else the committed one."""
    return WORK / name if (WORK / name / "README.md").is_file() else COMMITTED / name


def _load(name: str) -> Any:
    if name not in ADAPTERS:
        return models.load(folder_of(name))
    from peft import PeftModel  # an optional dependency, only of the adapters

    return PeftModel.from_pretrained(models.load(models.base_folder()), folder_of(name)).eval()


def write(path: Path) -> None:
    """Measure every language model there is and write ``{"models": {name: {domain: nats per token}}}``."""
    table: dict[str, Any] = {}
    for name in (*DENSE, *ADAPTERS, *MIXTURES):
        if (folder_of(name) / "README.md").is_file():
            table[name] = {domain: round(value, 5) for domain, value in models.losses(_load(name)).items()}
    manifest = read_manifest()
    document = {
        "unit": "nats per token",
        "window": WINDOW,
        "text": {domain: manifest[domain]["sha256"] for domain in DOMAINS},
        "models": table,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
