"""``import`` shows what a mergekit recipe means here; what it prints is a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mergekit_lr import load_recipe
from mergekit_lr.cli import app

CORPUS = Path(__file__).parents[1] / "compat" / "recipes"


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["import", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_output_is_the_same_recipe(tmp_path: Path) -> None:
    source = CORPUS / "cards" / "della_linear_three.yml"
    code, out, err = run(str(source))
    assert (code, err) == (0, "")
    (tmp_path / "again.yml").write_text(out)
    assert load_recipe(tmp_path / "again.yml").digest() == load_recipe(source).digest()
    told = [line.split(":")[0] for line in out.splitlines() if line.startswith("#  - ")]
    assert told == ["#  - arithmetic", "#  - random masks", "#  - rescale"]


def test_harmless_keys_are_warned_of() -> None:
    code, _, err = run(str(CORPUS / "cards" / "arcee_fusion_parameters.yml"))
    assert code == 0
    assert [line.split(": ")[2] for line in err.splitlines()] == [
        "parameters.normalize",
        "parameters.int8_mask",
        "parameters.rescale",
    ]


@pytest.mark.parametrize(
    ("recipe", "about"),
    [
        ("examples/ties_gradients", ["arithmetic", "equal magnitudes at a threshold"]),
        ("cards/model_stock_out_dtype", []),
        ("cards/ties_full_density", ["arithmetic"]),
        ("cards/dare_ties_full", ["arithmetic"]),
        ("cards/karcher_default", ["config.json and tokenizer"]),
        ("cards/task_arithmetic_lora", ["adapters"]),
        ("cards/frankenmerge_base_model", []),
        ("cards/two_stage_slerp", ["arithmetic", "stages"]),
        ("examples/arcee_fusion", ["arithmetic", "dtype", "quartiles"]),
    ],
)
def test_exactly_the_differences_that_a_recipe_meets(recipe: str, about: list[str]) -> None:
    code, out, _ = run(str(CORPUS / f"{recipe}.yml"), "--json")
    assert code == 0
    assert [d["about"] for d in json.loads(out)["differences"]] == about


SPARSE = """\
merge_method: dare_ties
base_model: ./base
dtype: float32
parameters: {rescale_by: BY}
models:
  - {model: ./a, parameters: {weight: 1, density: 0.5}}
"""


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("merge_method: wudi\nbase_model: ./base\nmodels: [{model: ./a}]\n", ["merge_method"]),
        (SPARSE.replace("BY", "density"), ["random masks", "rescale"]),
        (SPARSE.replace("BY", "l1"), ["random masks"]),
    ],
    ids=["a method of ours", "scaled by the density", "scaled as in mergekit"],
)
def test_a_difference_is_told_only_where_it_is_met(text: str, about: list[str], tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(text)
    _, out, _ = run(str(tmp_path / "r.yml"), "--json")
    assert [d["about"] for d in json.loads(out)["differences"]] == about


def test_nothing_different_is_said_too() -> None:
    _, out, _ = run(str(CORPUS / "cards" / "model_stock_out_dtype.yml"))
    assert out.startswith("# Nothing in this recipe has another meaning here than in mergekit 0.1.5.\n")


def test_a_misspelt_recipe_is_an_error_with_the_nearest_word(tmp_path: Path) -> None:
    text = (CORPUS / "cards" / "slerp_constant.yml").read_text().replace("parameters", "paramters")
    (tmp_path / "r.yml").write_text(text)
    code, out, err = run(str(tmp_path / "r.yml"))
    assert (code, out) == (3, "")
    assert "did you mean 'parameters'?" in err


def test_one_stage_of_a_file() -> None:
    _, out, _ = run(str(CORPUS / "documentation" / "multi_stage.yml"), "--stage", "first-merge")
    assert "\nmerge_method: linear\n" in out
