"""`doctor` against an environment made for the test: plug-ins that fail in every way, packages that are too old."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mergekit_lr
from mergekit_lr.report import doctor as module
from mergekit_lr.report.doctor import Package

PLUGINS = {
    "good": "odd_plugins.good:Good",
    "missing": "no_such_module:X",
    "broken": "odd_plugins.broken:X",
    "leaves": "odd_plugins.leaves:X",
    "killed": "odd_plugins.killed:X",
    "number": "odd_plugins.number:X",
    "linear": "odd_plugins.mark:X",
}
GOOD = """
from mergekit_lr.methods.linear import Linear

class Good(Linear):
    name = "good"

print("a word on standard output")
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution whose methods are the above; ``mark`` leaves a file if it is imported."""
    site = tmp_path / "site"
    info = site / "odd_plugins-2.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-plugins\nVersion: 2.5\n")
    entries = "".join(f"{n} = {v}\n" for n, v in PLUGINS.items())
    (info / "entry_points.txt").write_text(f"[mergekit_lr.methods]\n{entries}")
    package = site / "odd_plugins"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "good": GOOD,
        "broken": "1 / 0",
        "leaves": "import sys; sys.exit(3)",
        "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "number": "X = 1",
        "mark": f"open({str(tmp_path / 'mark')!r}, 'w').close(); X = 1",
    }.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(site)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), before))))
    return tmp_path


def test_plugins_that_fail_in_every_way(distribution: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = {p.name: p for p in mergekit_lr.doctor().plugins}
    assert {n: found[n].distribution for n in PLUGINS} == dict.fromkeys(PLUGINS, "odd-plugins 2.5")
    assert found["good"].error == ""
    assert "No module named 'no_such_module'" in found["missing"].error
    assert "ZeroDivisionError" in found["broken"].error
    assert "ended with 3" in found["leaves"].error
    assert "ended with -9" in found["killed"].error
    assert "not a merge method" in found["number"].error
    assert "a method of ours has that name" in found["linear"].error
    assert not (distribution / "mark").exists(), "what is never used was imported"
    assert not [m for m in sys.modules if m.startswith("odd_plugins")], "imported into this process"
    assert capfd.readouterr().out == ""


def test_a_plugin_that_never_ends(distribution: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (distribution / "site" / "odd_plugins" / "good.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    assert module._import_error("good") == "its import does not end (0 seconds)"


def test_the_command(distribution: Path, tmp_path: Path) -> None:
    """Without ``--strict`` problems are told; with it they are also the exit code."""
    code = "from mergekit_lr.cli import main; main()"

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, "doctor", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    (distribution / "site" / "odd_plugins-2.5.dist-info" / "entry_points.txt").write_text(
        "[mergekit_lr.methods]\nlinear = a:b\n"
    )
    plain = run()
    assert plain.returncode == 0, plain.stderr
    assert "PROBLEM: plug-in linear of odd-plugins 2.5: a method of ours" in plain.stdout
    strict = run("--strict", "--json")
    assert strict.returncode == 6 and "1 found" in strict.stderr
    found = json.loads(strict.stdout)
    assert found["mergekit_lr"] == mergekit_lr.__version__
    assert found["plugins"] == [
        {"name": "linear", "distribution": "odd-plugins 2.5", "error": found["plugins"][0]["error"]}
    ]
    assert {p["name"]: p["version"] for p in found["packages"]}["torch"] == torch.__version__
    assert found["places"][0] == {
        **found["places"][0],
        "what": "working folder",
        "path": str(tmp_path),
        "writable": True,
    }


def test_extras_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "torch>=2.11",
        "numpy>=99",
        "surely-not-there>=3; extra == 'odd'",
        "torch>=99; extra == 'odd'",
        "pytest>=9; extra == 'test'",
        "never; sys_platform == 'nowhere' and extra == 'odd'",
        "always>=1; python_version > '3'",
    ]
    monkeypatch.setattr(module, "requires", lambda name: asked)
    monkeypatch.setattr(module, "metadata", lambda name: type("M", (), {"get_all": lambda self, k: ["odd", "test"]})())
    found = module._packages()
    assert [(p.name, p.needed, p.extra) for p in found] == [
        ("torch", ">=2.11", ""),
        ("numpy", ">=99", ""),
        ("always", ">=1", ""),
        ("surely-not-there", ">=3", "odd"),
        ("torch", ">=99", "odd"),
    ]
    assert [p.fits for p in found] == [True, False, False, False, False]
    problems = mergekit_lr.doctor().problems
    assert [p.split(" ")[0] for p in problems] == ["numpy", "always", "torch"]  # an extra may be left out, not be old
    assert problems[1] == "always is not installed (>=1 is needed)"


@pytest.mark.parametrize(
    ("version", "fits"), [("2.11.0+cu128", True), ("2.12.0.dev3", True), ("2.10.9", False), ("", False)]
)
def test_versions(version: str, fits: bool) -> None:
    assert Package("torch", ">=2.11", version).fits == fits


def test_a_place_that_is_not_there_yet(tmp_path: Path) -> None:
    place = module._place("x", tmp_path / "a" / "b")
    assert place.free > 0 and place.writable and place.path == str(tmp_path / "a" / "b")


def test_a_problem_less_installation_says_so() -> None:
    found = mergekit_lr.doctor()
    lines = found.summary_lines()
    assert lines[-1] == "no problem found" or found.problems
    assert any(line.startswith("memory") for line in lines) and any("[ray]" in line for line in lines)
