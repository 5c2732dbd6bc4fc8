"""width_shrink, neuron_select and moe_budget from a recipe to a model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import mergekit_lr
from mergekit_lr.calibration.layers import windows_for
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.reference import ModelReference
from mergekit_lr.errors import CheckpointError, RecipeError

from ..calibration.families import make_model
from ..killing import killed_everywhere

HELDOUT = Path(__file__).parents[2] / "examples" / "text" / "heldout"
METHODS = {
    "width_shrink": {"keep": 0.4, "multiple": 4},
    "neuron_select": {"num_experts": 5},
    "moe_budget": {"keep": 0.5, "multiple": 4, "candidates": 3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-MoE: two layers of 8 experts of width 20, three per token."""
    logging.disable_progress_bar()
    return make_model("qwen3_moe", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("c", "german"):
        (folder / f"{name}.txt").write_text((HELDOUT / f"{name}.txt").read_text()[:20_000])
    return [str(folder / "c.txt"), str(folder / "german.txt")]


def recipe(model: Path, texts: list[str], method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "models": [{"model": str(model)}],
        "parameters": parameters,
        "calibration": {"text": texts, "samples": 12, "sequence_length": 64},
    }


@pytest.fixture(scope="module")
def merged(model: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each method's output."""
    folder = tmp_path_factory.mktemp("merged")
    for method, parameters in METHODS.items():
        mergekit_lr.merge(recipe(model, texts, method, **parameters), folder / method, device="cpu")
    return {method: folder / method for method in METHODS}


def load(folder: Path) -> Any:
    network, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return network.eval()


def details(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "merge_report.json").read_text())["details"]
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_it_and_the_report_says_what_it_costs(
    method: str, merged: dict[str, Path], model: Path, texts: list[str]
) -> None:
    after, before = load(merged[method]), load(model)
    held = details(merged[method])["held_out"]
    with open_model(ModelReference.parse(str(model))) as checkpoint:
        windows = windows_for(checkpoint, texts, samples=12, sequence_length=64, seed=0)
    sums = {t: torch.zeros(4, dtype=torch.float64) for t in texts}
    for ids, source, judged in zip(windows.ids, windows.sources, windows.held_out, strict=True):
        if judged:
            with torch.no_grad():
                one, other = (torch.log_softmax(m(input_ids=ids[None]).logits[0, :-1], -1) for m in (before, after))
            assert torch.isfinite(other).all()
            following = ids[1:, None]
            kl = (one.exp() * (one - other)).sum()
            row = [-one.gather(1, following).sum(), -other.gather(1, following).sum(), kl, len(following)]
            sums[texts[source]] += torch.tensor([float(x) for x in row], dtype=torch.float64)
    for text, (first, second, kl, n) in ((t, s.tolist()) for t, s in sums.items()):
        said = held["texts"][text]
        assert said["loss_original"] == pytest.approx(first / n, abs=2e-5)
        assert said["loss"] == pytest.approx(second / n, abs=2e-5)
        assert said["kl"] == pytest.approx(kl / n, abs=2e-5)
    size = details(merged[method])["size"]
    assert size["parameters"]["after"] == sum(t.numel() for t in weights(merged[method]).values())
    assert size["parameters"]["before"] == sum(t.numel() for t in weights(model).values())
    assert "| mean |" in (merged[method] / "README.md").read_text()


def test_neurons_are_real_ones_and_the_router_is_not_touched(merged: dict[str, Path], model: Path) -> None:
    old, new = weights(model), weights(merged["width_shrink"])
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        assert torch.equal(new[f"{block}.gate.weight"], old[f"{block}.gate.weight"])
        for e in range(8):
            gate, up = (new[f"{block}.experts.{e}.{m}_proj.weight"] for m in ("gate", "up"))
            assert gate.shape == (8, 32)
            rows = [row.tolist() for row in old[f"{block}.experts.{e}.gate_proj.weight"]]
            taken = [rows.index(row.tolist()) for row in gate]
            assert taken == sorted(set(taken))
            assert torch.equal(up, old[f"{block}.experts.{e}.up_proj.weight"][taken])


def test_selected_experts_have_their_rows_of_the_router_and_neurons_of_their_group(
    merged: dict[str, Path], model: Path
) -> None:
    old, new = weights(model), weights(merged["neuron_select"])
    notes = details(merged["neuron_select"])["layers"]
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        kept, groups = notes[block]["kept"], notes[block]["groups"]
        assert len(kept) == 5 and kept == sorted(kept)
        assert torch.equal(new[f"{block}.gate.weight"], old[f"{block}.gate.weight"][kept])
        assert sorted(e for g in groups for e in g) == list(range(8))
        for e, group in enumerate(groups):
            rows = {
                (tuple(a.tolist()), tuple(b.tolist()))
                for m in group
                for a, b in zip(*(old[f"{block}.experts.{m}.{n}_proj.weight"] for n in ("gate", "up")), strict=True)
            }
            pairs = zip(*(new[f"{block}.experts.{e}.{n}_proj.weight"] for n in ("gate", "up")), strict=True)
            mine = {(tuple(a.tolist()), tuple(b.tolist())) for a, b in pairs}
            assert len(mine) == 20 and mine <= rows
        assert f"{block}.experts.5.gate_proj.weight" not in new


def test_the_budget_goes_where_held_out_loss_is_lowest(merged: dict[str, Path]) -> None:
    found = details(merged["moe_budget"])
    assert found["considered"][0] == [8, 8] and found["considered"][-1] == [4, 20]
    count, width = found["chosen"]
    losses = {pair: t["loss"] for pair, t in found["trials"].items()}
    assert losses[f"{count}x{width}"] == min(losses.values()) == found["held_out"]["mean"]["loss"]
    assert count * width <= 0.5 * 8 * 20
    config = json.loads((merged["moe_budget"] / "config.json").read_text())
    assert (config["num_experts"] if "num_experts" in config else config["num_local_experts"]) == count
    assert config["moe_intermediate_size"] == width


def test_everything_kept_changes_nothing(model: Path, texts: list[str], tmp_path: Path) -> None:
    for method in ("width_shrink", "moe_budget"):
        mergekit_lr.merge(recipe(model, texts, method, keep=1.0), tmp_path / method, device="cpu")
        old, new = weights(model), weights(tmp_path / method)
        assert old.keys() == new.keys() and all(torch.equal(new[k], old[k]) for k in old)


def test_a_refit_lowers_the_error_of_every_layer(model: Path, texts: list[str], tmp_path: Path) -> None:
    found = {}
    for refit in ("none", "own", "blocks", "joint"):
        out = tmp_path / refit
        mergekit_lr.merge(recipe(model, texts, "width_shrink", keep=0.4, multiple=4, refit=refit), out, device="cpu")
        found[refit] = [n["error"] for n in details(out)["layers"].values()]
    for layer in range(2):
        assert found["own"][layer] <= found["none"][layer]
        assert max(found["joint"][layer], found["blocks"][layer]) < found["none"][layer]


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_interruptions_do_not_change_a_byte(
    method: str, merged: dict[str, Path], model: Path, texts: list[str], tmp_path: Path
) -> None:
    plain = recipe(model, texts, method, **METHODS[method])
    for which in ("layers.0.mlp", "layers.1.mlp", "summary.json"):

        def hook(operation: str, path: str | Path, which: str = which) -> None:
            if operation == "rename" and which in str(path):
                raise KeyboardInterrupt

        fs.set_hook(hook)
        try:
            with pytest.raises(KeyboardInterrupt):
                mergekit_lr.merge(plain, tmp_path / "out", device="cpu", threads=2)
        finally:
            fs.set_hook(None)
        assert not (tmp_path / "out").exists()
    mergekit_lr.merge(plain, tmp_path / "out", device="cpu", threads=1)
    for path in merged[method].iterdir():
        if path.name != "merge_report.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_every_file_operation(method: str, model: Path, texts: list[str], tmp_path: Path) -> None:
    plain = recipe(model, texts, method, **METHODS[method])
    action = f"import mergekit_lr\n\ndef act(out):\n    mergekit_lr.merge({plain!r}, out, device='cpu', threads=1)\n"
    assert killed_everywhere(action, tmp_path / "work", timeout=1200) > 20


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("neuron_select", {"num_experts": 8}, "not fewer than now"),
        ("neuron_select", {"num_experts": 2}, "sends each token to 3"),
        ("width_shrink", {"keep": 0.0}, "keep"),
    ],
)
def test_impossible_reductions_are_refused(
    method: str, parameters: dict[str, Any], message: str, model: Path, texts: list[str], tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, RecipeError), match=message):
        mergekit_lr.merge(recipe(model, texts, method, **parameters), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_statistics_cannot_stand_for_text(model: Path, tmp_path: Path) -> None:
    plain = recipe(model, [], "width_shrink", keep=0.5)
    plain["calibration"] = {"statistics": "s.safetensors"}
    with pytest.raises(RecipeError, match="needs the tokens themselves"):
        mergekit_lr.merge(plain, tmp_path / "out", device="cpu")


def test_a_dense_model_is_refused(texts: list[str], tmp_path: Path) -> None:
    dense = Path(__file__).parents[2] / "examples" / "models" / "base"
    with pytest.raises(CheckpointError, match="dense"):
        mergekit_lr.merge(recipe(dense, texts, "width_shrink", keep=0.5), tmp_path / "out", device="cpu")


def test_one_window_is_too_little_to_judge_by(model: Path, texts: list[str], tmp_path: Path) -> None:
    plain = recipe(model, texts[:1], "width_shrink", keep=0.4, multiple=4)
    plain["calibration"]["samples"] = 1
    with pytest.raises(CheckpointError, match="too little text to fit and to judge"):
        mergekit_lr.merge(plain, tmp_path / "out", device="cpu")
