"""What a run would find here: versions, device, memory, CPUs, plug-ins, disk space."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from mergekit_lr.engine.machine import free_memory, usable_cpus
from mergekit_lr.engine.memory import default_limit
from mergekit_lr.engine.plan import choose_device
from mergekit_lr.registry import GROUP, builtin_methods

DISTRIBUTION = "mergekit-lr"
PATIENCE = 120.0  # seconds that a plug-in may take to be imported
FOR_DEVELOPERS = ("test", "zoo")
"""Extras that no command of ours needs."""

_LOAD = "import sys; from mergekit_lr.registry import plugin_method; plugin_method(sys.argv[1])"


@dataclass(frozen=True)
class Package:
    """A distribution that we need, or that ``extra`` does. ``version`` is empty where it is not installed."""

    name: str
    needed: str
    version: str
    extra: str = ""

    @property
    def fits(self) -> bool:
        return bool(self.version) and Requirement(self.name + self.needed).specifier.contains(self.version, True)


@dataclass(frozen=True)
class Plugin:
    """A method of another distribution. ``error`` is empty where it can be imported."""

    name: str
    distribution: str
    error: str = ""


@dataclass(frozen=True)
class Place:
    """A folder that runs write to, and the bytes that are free there."""

    what: str
    path: str
    free: int
    writable: bool


@dataclass
class Diagnosis:
    """``problems`` are what would stop a run; everything else is as it is."""

    mergekit_lr: str
    python: str
    system: str
    packages: list[Package]
    device: str
    device_why: str
    free_bytes: int
    free_why: str
    memory_limit: int
    cpus: int
    cpus_why: str
    plugins: list[Plugin]
    places: list[Place]
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)

    def summary_lines(self) -> list[str]:
        """For people."""
        rows = [("mergekit-lr", self.mergekit_lr), ("python", self.python), ("system", self.system)]
        rows += [(p.name, _state(p)) for p in self.packages if not p.extra]
        for extra in dict.fromkeys(p.extra for p in self.packages if p.extra):
            rows.append((f"[{extra}]", ", ".join(f"{p.name} {_state(p)}" for p in self.packages if p.extra == extra)))
        memory = f"{_gib(self.memory_limit)} unless --max-memory says otherwise: half of what is free, at most 8 GiB"
        rows += [
            ("device", f"{self.device}: {self.device_why}"),
            ("memory", memory),
            ("", f"{_gib(self.free_bytes)} are {self.free_why}"),
            ("CPUs", f"{self.cpus} {self.cpus_why}"),
            *((p.what, f"{_gib(p.free)} free{'' if p.writable else ', NOT WRITABLE'}: {p.path}") for p in self.places),
            *((f"plug-in {p.name}", f"{p.distribution}: {p.error or 'loads'}") for p in self.plugins),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {text}" for name, text in rows]
        return [*lines, *(f"PROBLEM: {p}" for p in self.problems)] if self.problems else [*lines, "no problem found"]


def doctor() -> Diagnosis:
    """Look at this installation and this machine; nothing is changed, and nothing of the network is asked.

    Every plug-in is imported, which runs its code, in a process of its own: one that fails, hangs or ends the process
    is a line of the result.
    """
    packages = _packages()
    free, cpus = free_memory(), usable_cpus()
    device = choose_device("auto")
    found = Diagnosis(
        mergekit_lr=_version(DISTRIBUTION),
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages=packages,
        device=device,
        device_why=_why(device),
        free_bytes=free.amount,
        free_why=free.why,
        memory_limit=default_limit(),
        cpus=cpus.amount,
        cpus_why=cpus.why,
        plugins=_plugins(),
        places=[
            _place("working folder", Path.cwd()),
            _place("temporary files", Path(tempfile.gettempdir())),
            _place("cache of the Hub", _cache()),
        ],
    )
    found.problems += [f"{p.name} {_state(p)}" for p in packages if not p.fits and (p.version or not p.extra)]
    found.problems += [f"plug-in {p.name} of {p.distribution}: {p.error}" for p in found.plugins if p.error]
    found.problems += [f"{p.what}: {p.path} may not be written to" for p in found.places if not p.writable]
    return found


def _packages() -> list[Package]:
    """What our own metadata asks for on this system: of every installation first, then of each extra for users."""
    try:
        asked = [Requirement(text) for text in requires(DISTRIBUTION) or []]
        extras = [e for e in metadata(DISTRIBUTION).get_all("Provides-Extra") or [] if e not in FOR_DEVELOPERS]
    except PackageNotFoundError:  # run from a folder of sources
        return []
    return [
        Package(r.name, str(r.specifier), _version(r.name), extra)
        for extra in ("", *extras)
        for r in asked
        if _applies(r, extra)
    ]


def _applies(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement is one of this extra alone; of the empty one: of every installation."""
    if requirement.marker is None:
        return not extra
    holds = requirement.marker.evaluate
    return holds({"extra": extra}) and not (extra and holds({"extra": ""}))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _state(package: Package) -> str:
    if package.fits:
        return package.version
    return f"{package.version or 'is not installed'} ({package.needed or 'any version'} is needed)"


def _why(device: str) -> str:
    """The GPU's name and memory, or why it is the CPU."""
    import torch

    if device != "cpu":
        card = torch.cuda.get_device_properties(device)
        return f"{card.name}, {_gib(card.total_memory)}, CUDA {torch.version.cuda or torch.version.hip}"
    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch has no CUDA"
    return "torch finds no GPU that it can use"


def _plugins() -> list[Plugin]:
    found = []
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        if point.dist is not None and point.dist.name == DISTRIBUTION:
            continue
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown distribution"
        if point.name in builtin_methods():
            error = "a method of ours has that name, and comes first; it needs another one"
        else:
            error = _import_error(point.name)
        found.append(Plugin(point.name, distribution, error))
    return found


def _import_error(name: str) -> str:
    """Why a plug-in cannot be imported, found out by a process of its own; empty where it can."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _LOAD, name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"its import does not end ({PATIENCE:.0f} seconds)"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"its import fails: {lines[-1][:300] if lines else f'the process ended with {done.returncode}'}"


def _cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _place(what: str, path: Path) -> Place:
    """Of a folder that is not there yet: of the nearest one above it that is."""
    there = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    return Place(what, str(path), shutil.disk_usage(there).free, os.access(there, os.W_OK | os.X_OK))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"
