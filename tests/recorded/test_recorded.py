"""The same recipe gives what mergekit 0.1.5 gave: within one bf16 ulp, for every deterministic method.

Three parties are compared on the same inputs: mergekit's recorded bf16 values, a float64 reference written from the
formulas, and this project. Where equal magnitudes meet at a selection threshold mergekit's choice is arbitrary (its
sort is unstable) and ours is the lowest flat index; the reference marks those entries and they are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_lr import merge

from . import inputs, reference, resolve, values

NAMES = values.recipe_names()
# Of the largest weight of a tensor. Ours computes in fp32 with fp64 reductions; this is two fp32 roundings' worth.
FLOAT32_TOLERANCE = 5e-7


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three families on disk, made once."""
    root = tmp_path_factory.mktemp("recorded")
    for family in inputs.FAMILIES:
        inputs.write_family(family, root / family)
    return root


@pytest.fixture(scope="session")
def loaded() -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """family -> model -> tensors."""
    return {f: {m: inputs.tensors(f, m) for m in inputs.models(f)} for f in inputs.FAMILIES}


@pytest.fixture(scope="session")
def recorded() -> dict[str, torch.Tensor]:
    """mergekit's flat bf16 results by recipe."""
    return load_file(values.RECORDED)


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    """What the recording says about itself."""
    with safe_open(values.RECORDED, framework="pt") as handle:
        found: dict[str, Any] = json.loads(handle.metadata()["facts"])
    return found


def read_recipe(name: str) -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load(values.recipe_path(name).read_text())
    return recipe


def load_output(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state |= load_file(shard)
    return state


def expectation(
    name: str, loaded: dict[str, dict[str, dict[str, torch.Tensor]]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The float64 results of a recipe by tensor, and the entries whose selection is open."""
    recipe, models = read_recipe(name), loaded[name.split("/")[0]]
    floating = [tensor for tensor, value in models["base"].items() if value.is_floating_point()]
    found = {o.name: reference.merged(recipe["merge_method"], o, models) for o in resolve.outputs(recipe, floating)}
    return {n: r.value for n, r in found.items()}, {n: r.open_choice for n, r in found.items()}


def too_far(ours: torch.Tensor, theirs: torch.Tensor, open_choice: torch.Tensor) -> int:
    """How many settled entries are more than one bf16 step apart."""
    return int(((values.bf16_steps(ours, theirs) > 1) & ~open_choice).sum())


def flat_mask(masks: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([masks[name].reshape(-1) for name in sorted(masks)])


def test_bf16_steps_counts_representable_values() -> None:
    one = torch.tensor([1.0, 1.0, -1.0, 0.0, 0.0, 2.0**-126, float("nan"), float("inf")], dtype=torch.bfloat16)
    other = torch.tensor([1.0, 1.0078125, -1.015625, -0.0, 9.1835e-41, 0.0, 1.0, 3.3895e38], dtype=torch.bfloat16)
    assert values.bf16_steps(one, other).tolist() == [0, 1, 2, 0, 1, 128, 65536, 1]
    across = torch.tensor([9.1835e-41, -9.1835e-41], dtype=torch.bfloat16)
    assert values.bf16_steps(across, across.flip(0)).tolist() == [2, 2]


def test_every_recipe_is_recorded(recorded: dict[str, torch.Tensor]) -> None:
    assert sorted(recorded) == NAMES
    assert len(NAMES) > 80


@pytest.mark.parametrize("family", inputs.FAMILIES)
def test_inputs_are_those_of_the_recording(
    family: str, facts: dict[str, Any], loaded: dict[str, dict[str, dict[str, torch.Tensor]]]
) -> None:
    for model, state in loaded[family].items():
        assert inputs.digest(state) == facts["inputs"][f"{family}/{model}"]


@pytest.mark.parametrize("name", NAMES)
def test_formula_explains_recorded_value(
    name: str, recorded: dict[str, torch.Tensor], loaded: dict[str, dict[str, dict[str, torch.Tensor]]]
) -> None:
    expected, open_choice = expectation(name, loaded)
    mask = flat_mask(open_choice)
    assert too_far(values.flatten(expected).bfloat16(), recorded[name], mask) == 0
    assert mask.float().mean() < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_merge_gives_recorded_value(
    name: str,
    checkpoints: Path,
    recorded: dict[str, torch.Tensor],
    facts: dict[str, Any],
    loaded: dict[str, dict[str, dict[str, torch.Tensor]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = name.split("/")[0]
    monkeypatch.chdir(checkpoints / family)
    merge(values.recipe_path(name), tmp_path / "out", device="cpu")
    ours = load_output(tmp_path / "out")
    assert values.layout_digest(ours) == facts["layout"][name]
    assert {t.dtype for t in ours.values() if t.is_floating_point()} == {torch.bfloat16}
    _, open_choice = expectation(name, loaded)
    assert too_far(values.flatten(ours), recorded[name], flat_mask(open_choice)) == 0
    for buffer, tensor in ours.items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, loaded[family]["base"][buffer])


@pytest.mark.parametrize("name", NAMES)
def test_merge_in_float32_is_the_formula(
    name: str,
    checkpoints: Path,
    loaded: dict[str, dict[str, dict[str, torch.Tensor]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bf16 ulp hides an error of a few percent of a task vector; without the last cast nothing is hidden."""
    monkeypatch.chdir(checkpoints / name.split("/")[0])
    recipe = read_recipe(name)
    del recipe["out_dtype"]
    merge(recipe, tmp_path / "out", device="cpu")
    ours = load_output(tmp_path / "out")
    expected, open_choice = expectation(name, loaded)
    for tensor, value in expected.items():
        assert ours[tensor].dtype == torch.float32
        error = (ours[tensor].double() - value).abs()[~open_choice[tensor]]
        limit = FLOAT32_TOLERANCE * max(float(value.abs().max()), 1e-3)
        assert not error.numel() or float(error.max()) <= limit, f"{tensor}: {float(error.max()):.2e} > {limit:.2e}"
