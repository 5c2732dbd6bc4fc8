"""docs/mergekit.md says what is true of the methods."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_lr import load_recipe
from mergekit_lr.errors import RecipeError
from mergekit_lr.recipe.catalogue import describe
from mergekit_lr.registry import builtin_methods, get_method

PAGE = (Path(__file__).parents[2] / "docs" / "mergekit.md").read_text()


def table_rows() -> list[tuple[str, str]]:
    """(method, what its row says) of the table of parameters."""
    table = PAGE.split("| method | parameters")[1].split("\n\n")[0].splitlines()[2:]
    rows = []
    for line in table:
        names, said = line.strip("| ").split("|", 1)
        rows += [(name, said) for name in re.findall(r"`(\w+)`", names)]
    return rows


def known_parameters(method: str) -> dict[str, dict[str, Any]]:
    facts = describe(get_method(method))
    return {p["name"]: p for p in [*facts["parameters"], *facts["model_parameters"]]}


@pytest.mark.parametrize(("method", "said"), table_rows())
def test_table_names_parameters_with_their_defaults(method: str, said: str) -> None:
    known = known_parameters(method)
    for item in re.findall(r"`([^`]+)`", said.split(";")[0]):
        name, _, default = item.partition(": ")
        assert name in known
        if default:
            assert known[name]["default"] == yaml.safe_load(default.replace("1e-", "1.0e-"))
        else:
            assert known[name]["required"] or name == "scale"


# What mergekit 0.1.5 calls its methods, all twenty.
IN_MERGEKIT = {
    *("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
    *("della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "model_stock", "sce", "passthrough"),
    *("arcee_fusion", "nearswap", "ram", "ramplus_tl"),
}


def test_table_has_every_method_that_mergekit_has() -> None:
    random_too = {"della", "della_linear", "dare_linear", "dare_ties"}
    assert {method for method, _ in table_rows()} | random_too == set(builtin_methods()) & IN_MERGEKIT


def test_della_alone_divides_by_the_weights() -> None:
    assert known_parameters("della")["normalize"]["default"] is True
    assert known_parameters("della_linear")["normalize"]["default"] is False


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_rescale_by_density_unless_told(method: str) -> None:
    assert known_parameters(method)["rescale_by"]["default"] == "density"
    assert known_parameters(method)["rescale"]["default"] is True


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_threshold_per_tensor_unless_told(method: str) -> None:
    assert known_parameters(method)["threshold_scope"]["default"] == "tensor"


REFUSED = {
    "unknown key": "merge_method: linear\nmodles: []\n",
    "unknown parameter": "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1, wieght: 2}}]\n",
    "density": "merge_method: ties\nbase_model: ./b\nmodels: [{model: ./a, parameters: {weight: 1, density: 1.7}}]\n",
    "epsilon": "merge_method: della\nbase_model: ./b\nmodels: [{model: ./a, parameters: {weight: 1, epsilon: -1}}]\n",
    "duplicate": "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1, weight: 2}}]\n",
    "zero sum": "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}, "
    "{model: ./b, parameters: {weight: -1}}]\n",
    "token": "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}]\n"
    "tokenizer: {tokens: {x: {source: {kind: model_token, model: ./c, token: y}}}}\n",
}


@pytest.mark.parametrize("fault", list(REFUSED))
def test_what_the_page_calls_an_error_is_one(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(REFUSED[fault])
    with pytest.raises(RecipeError):
        load_recipe(path)
