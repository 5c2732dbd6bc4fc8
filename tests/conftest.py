"""Settings for every suite."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

# Before anything imports triton (torch and transformers do): its own functions are bound to the interpreter or to the
# compiler when it is imported. Where there is a GPU the kernels are compiled.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

from .watching import watch

# In CI a property test draws the same examples every time: a failure there must be due to the change. Everywhere else
# they are drawn afresh, which is how new ones are found.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

WATCHED = pytest.StashKey[Path]()
FINDINGS = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Watch the session: see `watching`."""
    log = Path(tempfile.mkdtemp(prefix="mergekit_lr-watch-")) / "log"
    config.stash[WATCHED] = log
    watch(log)


@pytest.fixture(scope="session")
def watch_log(pytestconfig: pytest.Config) -> Path:
    """Where the watcher writes what it finds."""
    return pytestconfig.stash[WATCHED]


def pytest_sessionfinish(session: pytest.Session) -> None:
    found = session.config.stash[WATCHED].read_text(encoding="utf-8").splitlines()
    found += session.config.stash.get(FINDINGS, [])
    session.config.stash[FINDINGS] = found
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["forbidden"] = found
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker's watcher found is the whole session's."""
    output = getattr(node, "workeroutput", {})
    stash = node.config.stash
    stash[FINDINGS] = [*stash.get(FINDINGS, []), *output.get("forbidden", [])]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash.get(FINDINGS, []):
        terminalreporter.write_line(f"FORBIDDEN: {line}", red=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[WATCHED].parent, ignore_errors=True)
