"""Bundles, looked at: what one holds, from bundle.json and headers, and whether it is what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.bundle.codes import CODES
from mergekit_lr.bundle.manifest import BASE, FILE, SHARED
from mergekit_lr.bundle.open import Bundle, open_bundle
from mergekit_lr.bundle.packing import storage_lines
from mergekit_lr.engine.digest import ALGORITHM
from mergekit_lr.errors import CheckpointError
from mergekit_lr.report.scan import scan


def is_bundle(path: Path) -> bool:
    """Whether a path is a folder that says it is a bundle."""
    return (path / FILE).is_file()


@dataclass(frozen=True)
class BundleInspection:
    """A bundle in numbers. ``storage`` is its table of bits and bytes; ``file_bytes`` what its shards really take."""

    bundle: str
    method: str
    tasks: list[str]
    parameters: Mapping[str, Any]
    base: str
    holds_base: bool
    adapters: bool
    tensors: int
    codes: dict[str, int]
    storage: Mapping[str, Any]
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(vars(self))

    def summary_lines(self) -> list[str]:
        """For people: one fact a line, then the table."""
        held = "held in the bundle" if self.holds_base else "not in the bundle"
        return [
            f"bundle        {self.bundle}",
            f"method        {self.method}",
            f"tasks         {', '.join(self.tasks)}",
            f"base          {self.base}, {held}",
            "tensors       " + ", ".join(f"{n} {code}" for code, n in self.codes.items()),
            f"on disk       {self.file_bytes:,} bytes of shards",
            *storage_lines(self.storage),
        ]


def inspect_bundle(folder: Path) -> BundleInspection:
    """Describe a bundle; reads headers only.

    Raises:
        CheckpointError: it cannot be opened.
    """
    with open_bundle(folder) as bundle:
        manifest = bundle.manifest
        codes: dict[str, int] = {}
        for entry in manifest.entries:
            codes[entry.code] = codes.get(entry.code, 0) + 1
        return BundleInspection(
            bundle=str(folder),
            method=manifest.method,
            tasks=list(bundle.tasks),
            parameters=manifest.parameters,
            base=str(manifest.base.get("model")),
            holds_base=not any(p.startswith(BASE) for e in manifest.entries for p in e.shared),
            adapters=manifest.adapters is not None,
            tensors=len(bundle.stored.tensors),
            codes=codes,
            storage=manifest.storage,
            file_bytes=sum(int(f["bytes"]) for f in manifest.files),
        )


@dataclass(frozen=True)
class BundleFindings:
    """What was wrong with a bundle, and how much of it was looked at."""

    problems: list[str]
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    digests_checked: int = 0
    holds_base: bool = False


def check_bundle(folder: Path, *, weights: bool) -> BundleFindings:
    """Open a bundle and, with ``weights``, read all of it: every digest, every value finite, every code known."""
    try:
        bundle = open_bundle(folder)
    except CheckpointError as e:
        return BundleFindings([str(e)])
    with bundle:
        problems = _unsound(bundle)
        tensors = {n: (info, bundle.stored.files[n].name) for n, info in bundle.stored.tensors.items()}
        checked = 0
        if weights:
            found, wrong = scan(folder, tensors)
            problems += wrong
            known = bundle.manifest.digests if bundle.manifest.digest_algorithm == ALGORITHM else {}
            for name, digest in found.items():
                checked += name in known
                if known.get(name, digest) != digest:
                    problems.append(
                        f"{name!r} is not as it was written: its digest is {digest}, not {known[name]}; "
                        "pack or copy it again"
                    )
        nbytes = sum(info.nbytes for info, _ in tensors.values())
        holds_base = not any(p.startswith(BASE) for e in bundle.manifest.entries for p in e.shared)
        return BundleFindings(problems, len(bundle.manifest.files), len(tensors), nbytes, checked, holds_base)


def _unsound(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    every = (*manifest.entries, *(manifest.adapters.entries if manifest.adapters else ()))
    problems = [
        f"{code!r} is no code that this version knows" for code in sorted({e.code for e in every} - CODES.keys())
    ]
    named = {f["file"] for f in manifest.files}
    stray = sorted(p.name for p in bundle.folder.glob("*.safetensors") if p.name not in named)
    problems += [f"{name} is no part of the bundle" for name in stray]
    missing = sorted(manifest.digests.keys() ^ bundle.stored.tensors.keys())
    problems += [f"{name!r} is in bundle.json or in the shards, but not in both" for name in missing[:3]]
    if not (bundle.folder / SHARED).is_dir() and (bundle.folder / "config.json").exists():
        problems.append("config.json stands at the root, where loaders would take the bundle for a model")
    return problems
