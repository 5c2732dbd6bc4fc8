"""Runs the command line, in this process or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mergekit_lr.cli import main

RECIPE = """\
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.75}}
  - {model: b, parameters: {weight: 0.25}}
dtype: float32
"""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``run("check", path)`` in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["mergekit-lr", *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return Done(left.value.code, captured.out, captured.err)

    return call


@pytest.fixture
def run_apart() -> Callable[..., Done]:
    """``run_apart("check", path, prelude="...")`` in a fresh interpreter; ``prelude`` is code that runs first."""

    def call(*arguments: object, prelude: str = "", cwd: Path | None = None) -> Done:
        code = f"{prelude}\nfrom mergekit_lr.cli import main\nmain()\n"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of two models that are not there."""
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE)
    return path
