"""Fisher from text against the definition, and reports against sums made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_lr
from mergekit_lr.curvatures.estimate import _draw
from mergekit_lr.errors import CheckpointError, RecipeError, ResourceError

BASE = Path(__file__).parents[2] / "examples" / "models" / "base"
TEXT = Path(__file__).parents[2] / "examples" / "text" / "heldout" / "python.txt"


def test_labels_from_the_text_give_squared_gradients(tmp_path: Path) -> None:
    """Two sequences: the mean of both gradients' squares, over predicted tokens, by autograd on the whole model."""
    out = mergekit_lr.curvature(
        BASE, tmp_path / "f.safetensors", text=[TEXT], samples=2, sequence_length=12, labels="text", device="cpu"
    ).out
    found = load_file(out)
    from mergekit_lr.evaluation import load_for_evaluation

    network, tokenizer = load_for_evaluation(BASE)
    ids = torch.tensor(tokenizer(TEXT.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    want: dict[str, torch.Tensor] = {}
    for start in (0, len(ids) - 12):
        row = ids[start : start + 12]
        network.zero_grad()
        logits = network(input_ids=row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        for name, p in network.named_parameters():
            want[name] = want.get(name, 0) + p.grad.square() / 22
    assert set(found) == {f"{n}.fisher" for n in want}
    for name, f in want.items():
        assert torch.allclose(found[f"{name}.fisher"], f, rtol=1e-4, atol=1e-12), name
    sums = load_file(
        mergekit_lr.curvature(
            BASE, tmp_path / "r.safetensors", text=[TEXT], samples=2, sequence_length=12, labels="text", form="rank1",
            device="cpu",
        ).out
    )  # fmt: skip
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.allclose(sums[f"{name}.fisher.row"], want[name].sum(1), rtol=1e-3)
    assert torch.allclose(sums[f"{name}.fisher.col"], want[name].sum(0), rtol=1e-3)


def test_labels_are_drawn_from_the_model() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().repeat(20_000, 1)
    counts = torch.bincount(_draw(logits, torch.Generator().manual_seed(0)), minlength=3) / 20_000
    assert torch.allclose(counts, torch.tensor([0.1, 0.2, 0.7]), atol=0.012)


def test_a_seed_decides_and_a_budget_holds(tmp_path: Path) -> None:
    options: dict[str, Any] = {"text": [TEXT], "samples": 1, "sequence_length": 8, "device": "cpu"}
    found = [
        load_file(mergekit_lr.curvature(BASE, tmp_path / f"{i}.safetensors", seed=s, **options).out)
        for i, s in enumerate((1, 1, 2))
    ]
    name = "model.norm.weight.fisher"
    assert torch.equal(found[0][name], found[1][name])
    assert not torch.equal(found[0][name], found[2][name])
    with pytest.raises(ResourceError, match="rank1"):
        mergekit_lr.curvature(BASE, tmp_path / "x.safetensors", max_memory="8MB", **options)
    with pytest.raises(CheckpointError, match="too short"):
        short = tmp_path / "short.txt"
        short.write_text("a b")
        mergekit_lr.curvature(BASE, tmp_path / "x.safetensors", **{**options, "text": [short]})
    assert not (tmp_path / "x.safetensors").exists()


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Two models of two layers whose curvatures agree in layer 0 and are mirrored in layer 1."""
    g = torch.Generator().manual_seed(0)
    shapes = {"model.layers.0.q_proj.weight": (6, 5), "model.layers.1.q_proj.weight": (6, 5), "model.norm.weight": (5,)}
    base = {n: torch.zeros(s) for n, s in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    entries = []
    logs = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    for k, sign in enumerate((1, -1)):
        deltas = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
        v = {n: (logs[n] * (sign if ".1." in n else 1) - 30).exp() for n in shapes}
        save_file(deltas, tmp_path / f"m{k}.safetensors")
        save_file(v, tmp_path / f"v{k}.safetensors")
        own = {"curvature": str(tmp_path / f"v{k}.safetensors"), "density": 0.5, "scale": 1.0 - k}
        entries.append({"model": str(tmp_path / f"m{k}.safetensors"), "parameters": own})
    return {"merge_method": "ota", "base_model": str(tmp_path / "base.safetensors"), "models": entries}


def test_a_report_by_layer_and_role(recipe: dict[str, Any]) -> None:
    found = mergekit_lr.curvature_report(recipe)
    assert set(found.layers) == {"model.layers.0", "model.layers.1", "outside the layers"}
    assert set(found.roles) == {"q_proj", "norm"}
    assert found.layers["model.layers.0"].overlap()[0, 1] == pytest.approx(1)
    assert found.layers["model.layers.1"].overlap()[0, 1] == pytest.approx(-1)
    assert found.whole.kept.tolist() == [32, 32]  # int(0.5 * 65) of each model, over all tensors
    assert found.whole.contribution().tolist() == [1, 0]  # the second one's scale is zero
    plain = found.to_dict()
    assert plain["whole"]["density"] == [round(32 / 65, 6)] * 2
    assert any(line.startswith("q_proj: ") for line in found.lines())


def test_overlap_is_a_correlation(recipe: dict[str, Any], tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(5)
    files = []
    for k in range(2):
        v = {n: torch.rand(x.shape, generator=g) for n, x in load_file(tmp_path / "v0.safetensors").items()}
        files.append(v)
        save_file(v, tmp_path / f"v{k}.safetensors")
    overlap = mergekit_lr.curvature_report(recipe).whole.overlap()[0, 1]
    flat = [torch.cat([v[n].flatten() for n in sorted(v)]).log().numpy() for v in files]
    assert overlap == pytest.approx(np.corrcoef(*flat)[0, 1], abs=1e-6)


def test_plots(recipe: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from mergekit_lr.curvatures.plots import draw

    drawn = draw(mergekit_lr.curvature_report(recipe), tmp_path / "figures")
    assert [p.name for p in drawn] == ["overlap.png", "density.png", "contribution.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in drawn)


def test_only_recipes_that_weigh_by_curvature() -> None:
    with pytest.raises(RecipeError, match="does not weigh by curvature"):
        mergekit_lr.curvature_report({"merge_method": "karcher", "models": [{"model": "a"}]})
