"""docs/cli.md shows what ``--help`` prints, and docs/recipes.md says what the loader does.

``python tests/cli/test_docs.py`` writes the help of every command into docs/cli.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergekit_lr.errors import RecipeError
from mergekit_lr.method import Base
from mergekit_lr.recipe import load_recipe
from mergekit_lr.recipe.walk import ROOT_KEYS
from mergekit_lr.registry import builtin_methods

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = [
    *("", "merge", "recover", "plan", "check", "import", "moe", "verify", "inspect", "methods", "schema", "doctor"),
    *("eval", "extract-lora", "transplant", "calibrate", "barrier", "curvature", "curvature-report", "fit-scales"),
]


def help_of(command: str) -> str:
    """What ``--help`` prints on a terminal of 80 columns."""
    arguments = [command, "--help"] if command else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", "from mergekit_lr.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def section(command: str) -> str:
    title = f"mergekit-lr {command}".strip()
    return f"## {title}\n\n```text\n{help_of(command)}\n```\n"


def rewrite() -> None:
    path = DOCS / "cli.md"
    head = path.read_text().split("\n## ")[0].rstrip("\n")
    path.write_text(head + "\n\n" + "\n".join(section(c) for c in COMMANDS))


@pytest.mark.parametrize("command", COMMANDS)
def test_cli_md_shows_the_help(command: str) -> None:
    assert section(command) in (DOCS / "cli.md").read_text(), "run: python tests/cli/test_docs.py"


def test_cli_md_shows_no_other_command() -> None:
    titles = re.findall(r"^## (.*)$", (DOCS / "cli.md").read_text(), re.M)
    assert titles == [f"mergekit-lr {c}".strip() for c in COMMANDS]


RECIPES = (DOCS / "recipes.md").read_text()


def test_the_first_recipe_is_good_and_the_second_gives_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = re.findall(r"```yaml\n(.*?)```", RECIPES, re.S)
    assert load_recipe(good).warnings == ()
    [shown] = re.findall(r"```\n(recipe\.yml:.*?)```", RECIPES, re.S)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yml").write_text(bad)
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yml")
    assert list(caught.value.problems) == shown.splitlines()


def test_every_key_has_a_row() -> None:
    table = RECIPES.split("## Keys")[1].split("## References")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.M)) == ROOT_KEYS


def test_the_table_of_precedence() -> None:
    import yaml

    rows = re.findall(r"^\| (`.*?`|none) \| (`.*?`) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)", RECIPES, re.M)
    assert len(rows) == 4
    for own, shared, *expected in rows:
        parameters: dict[str, Any] = {"weight": 1}
        if own != "none":
            parameters["density"] = yaml.safe_load(own.strip("`"))
        recipe = load_recipe(
            {
                "merge_method": "ties",
                "base_model": "./base",
                "models": [{"model": "./a", "parameters": parameters}],
                "parameters": {"density": yaml.safe_load(shared.strip("`"))},
            }
        )
        names = ("layers.0.mlp.up_proj", "layers.0.self_attn.q_proj", "norm")
        found = [recipe.resolve(n, 0.0)[1][0].density for n in names]  # type: ignore[attr-defined]
        assert found == [float(e) for e in expected]


def test_the_methods_named_for_each_kind_of_base_are_of_that_kind() -> None:
    for kind in Base:
        [named] = re.findall(rf"^- \*\*{kind}\*\* \(([^)]*)\)", RECIPES, re.M)
        for name in re.findall(r"`(\w+)`", named):
            assert builtin_methods()[name].base is kind


if __name__ == "__main__":
    rewrite()
