"""Merged adapters against dense sums, PEFT's own combinations, and models that the adapters are applied to."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lr import merge, plan
from mergekit_lr.errors import CheckpointError, RecipeError

from .conftest import CONFIG, DOWN, EMBED, NORM, SHAPES, Q, make_base, normal, tensors_of


def recipe(base: Path, adapters: list[Path], weights: list[float] | None = None, **parameters: Any) -> dict[str, Any]:
    weights = weights or [0.5] * len(adapters)
    entries = [{"model": f"{base}+{a}", "parameters": {"weight": w}} for a, w in zip(adapters, weights, strict=True)]
    return {"merge_method": "lora_merge", "base_model": str(base), "models": entries, "parameters": parameters}


def summed(base: Path, adapters: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    """Task arithmetic on the dense models."""
    old = {n: t.double() for n, t in tensors_of(base).items()}
    models = [tensors_of(f"{base}+{a}") for a in adapters]
    return {n: t + sum(w * (m[n].double() - t) for m, w in zip(models, weights, strict=True)) for n, t in old.items()}


def agree(base: Path, out: Path, expected: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    found = tensors_of(f"{base}+{out}")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), atol=atol, rtol=0)


@pytest.mark.parametrize("combination", ["cat", "svd", "knots"])
def test_exact_combinations_are_the_dense_sum(combination: str, base: Path, adapter: Any, tmp_path: Path) -> None:
    """Other ranks, alphas and rsLoRA: every scale is folded. Full rank and a linear rule leave nothing out."""
    made = [
        adapter("a", 1, rank=2),
        adapter("b", 2, rank=3, use_rslora=True),
        adapter("c", 3, rank=1, saved={NORM: normal(9, 12), EMBED: normal(8, 30, 12)}),
    ]
    weights = [0.5, -1.0, 2.0]
    more = {"svd": {"rank": 6}, "cat": {}, "knots": {"rule": "task_arithmetic"}}[combination]
    merge(recipe(base, made, weights, combination=combination, **more), tmp_path / "out", device="cpu")
    agree(base, tmp_path / "out", summed(base, made, weights))
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "merge_report.json", "README.md"}
    assert not files & {"config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6 and config["use_rslora"] is False
    assert config["modules_to_save"] == ["model.embed_tokens", "model.norm"]


def test_svd_is_the_best_of_its_rank(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter("a", 1), adapter("b", 2)]
    report = merge(recipe(base, made), tmp_path / "out", device="cpu").report
    dense = summed(base, made, [0.5, 0.5])[Q] - tensors_of(base)[Q].double()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    found = tensors_of(f"{base}+{tmp_path / 'out'}")[Q].double() - tensors_of(base)[Q].double()
    torch.testing.assert_close(found, (u[:, :3] * s[:3]) @ vh[:3], atol=1e-6, rtol=0)
    assert report["notes"][Q]["relative_error"] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-6)


def test_knots_ties_is_ties_on_the_aligned_parts(base: Path, adapter: Any, tmp_path: Path) -> None:
    """Against numpy-style TIES by hand on ``S V_i^T`` of a full SVD of the dense deltas side by side."""
    made = [adapter("a", 1), adapter("b", 2)]
    given = recipe(base, made, [1.0, 1.0], combination="knots", rule="ties")
    for entry in given["models"]:
        entry["parameters"]["density"] = 0.5
    merge(given, tmp_path / "out", device="cpu")
    old = tensors_of(base)[Q].double()
    deltas = [tensors_of(f"{base}+{a}")[Q].double() - old for a in made]
    u, s, vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    u, parts = u[:, :6], (s[:6, None] * vh[:6]).split(12, dim=1)
    trimmed = []
    for part in parts:
        keep = part.abs().flatten().sort(descending=True).values[part.numel() // 2 - 1]
        trimmed.append(torch.where(part.abs() >= keep, part, 0.0))
    total = trimmed[0] + trimmed[1]
    sign = torch.where(total >= 0, 1.0, -1.0)
    agreeing = [torch.where(t.sign() == sign, t, 0.0) for t in trimmed]
    count = sum((a != 0).double() for a in agreeing).clamp(min=1)
    expected = u @ ((agreeing[0] + agreeing[1]) / count)
    found = tensors_of(f"{base}+{tmp_path / 'out'}")[Q].double() - old
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


def test_filters_and_gradients_hold_by_module(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter("a", 1), adapter("b", 2)]
    given = recipe(base, made, combination="cat")
    given["models"][0]["parameters"]["weight"] = [{"filter": "mlp", "value": 2.0}, {"value": 0.0}]
    given["models"][1]["parameters"]["weight"] = [0.0, 1.0]  # over two layers
    merge(given, tmp_path / "out", device="cpu")
    expected = summed(base, made, [0.0, 0.0])
    expected[DOWN] = summed(base, made, [2.0, 1.0])[DOWN]
    agree(base, tmp_path / "out", expected)


def test_a_missing_module_counts_as_unchanged_and_is_said(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter("a", 1), adapter("b", 2, weights=(Q,))]
    result = merge(recipe(base, made, combination="cat"), tmp_path / "out", device="cpu")
    agree(base, tmp_path / "out", summed(base, made, [0.5, 0.5]))
    assert any("is not adapted by" in w for w in result.report["warnings"])
    assert result.report["details"]["missing"] == {DOWN: [f"{base}+{made[1]}"]}
    with pytest.raises(CheckpointError, match="do not change the same modules"):
        merge(recipe(base, made, missing="error"), tmp_path / "no", device="cpu")


def test_peft_agrees(base: Path, adapter: Any, tmp_path: Path) -> None:
    """PEFT's ``linear`` is what ``peft_linear`` gives, cross terms and all, and what the others are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel
    made = [adapter("a", 1, target_modules=["q_proj", "down_proj"]), adapter("b", 2)]
    weights = [0.7, -0.4]

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(12, 16, bias=False)

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Linear(20, 12, bias=False)

    class Layer(torch.nn.Module):
        def __init__(self, name: str, inner: torch.nn.Module) -> None:
            super().__init__()
            setattr(self, name, inner)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [Layer("self_attn", Attention()), Layer("mlp", Mlp())]
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList(layers)
            self.config = dict(CONFIG)

        def prepare_inputs_for_generation(self) -> None:
            """PEFT looks for it in a causal language model."""

    for a in made:
        path = a / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["q_proj", "down_proj"]}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = PeftModel.from_pretrained(Network(), made[0], adapter_name="a")
        network.load_adapter(made[1], adapter_name="b")
        network.add_weighted_adapter(["a", "b"], weights, "both", combination_type="linear")
    theirs = network.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("both")
    merge(recipe(base, made, weights, combination="peft_linear"), tmp_path / "linear", device="cpu")
    merge(recipe(base, made, weights, combination="cat"), tmp_path / "cat", device="cpu")
    old = tensors_of(base)[Q]
    ours = tensors_of(f"{base}+{tmp_path / 'linear'}")[Q] - old
    torch.testing.assert_close(ours, theirs.detach(), atol=2e-6, rtol=0)
    exact = tensors_of(f"{base}+{tmp_path / 'cat'}")[Q] - old
    assert (ours - exact).norm() > 0.3 * exact.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reloaded = PeftModel.from_pretrained(Network(), tmp_path / "cat")
    theirs = reloaded.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    torch.testing.assert_close(theirs.detach(), exact, atol=2e-6, rtol=0)


def test_bad_input(base: Path, adapter: Any, tmp_path: Path) -> None:
    a, b = adapter("a", 1), adapter("b", 2, rank=2)
    out = tmp_path / "out"

    def refused(match: str, adapters: list[Path], kind: Any = CheckpointError, **parameters: Any) -> None:
        with pytest.raises(kind, match=match):
            merge(recipe(base, adapters, **parameters), out, device="cpu")
        assert not out.exists()

    refused("a DoRA adapter is not a low-rank change", [a, adapter("dora", 3, use_dora=True)])
    refused("must be of one rank", [a, b], combination="peft_linear")
    refused("different revisions", [adapter("r1", 4, revision="one"), adapter("r2", 5, revision="two")])
    saved = adapter("s", 6, weights=(DOWN,), saved={Q: normal(1, 16, 12)})
    refused("in one adapter and saved whole in another", [a, saved])
    refused("rank is not used", [a, b], RecipeError, combination="cat", rank=2)
    plain = recipe(base, [a])
    plain["models"].append({"model": str(make_base(tmp_path / "plain")), "parameters": {"weight": 1.0}})
    with pytest.raises(CheckpointError, match=r"no adapter; write it as BASE_MODEL\+ADAPTER"):
        merge(plain, out, device="cpu")
    spoilt = adapter("nan", 7, size=float("nan"))
    refused("NaN|not finite|infinit", [a, spoilt])
    other = make_base(tmp_path / "other", torch.bfloat16)
    given = recipe(base, [a])
    given["models"].append({"model": f"{other}+{b}", "parameters": {"weight": 1.0}})
    with pytest.raises(CheckpointError, match="its base is not"):
        merge(given, out, device="cpu")


def test_other_revisions_are_accepted_when_asked(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter("r1", 4, revision="one"), adapter("r2", 5, revision="two")]
    result = merge(recipe(base, made, different_bases=True), tmp_path / "out", device="cpu")
    assert any("name different bases" in w for w in result.report["warnings"])


def test_plan_reads_nothing_and_says_the_size(base: Path, adapter: Any, tmp_path: Path) -> None:
    found = plan(recipe(base, [adapter("a", 1), adapter("b", 2)], combination="cat"))
    numbers = sum(6 * (SHAPES[n][0] + SHAPES[n][1]) for n in (Q, DOWN))
    merge(recipe(base, [tmp_path / "a", tmp_path / "b"], combination="cat"), tmp_path / "out", device="cpu")
    assert found.parameters == numbers
    assert sum(t.numel() for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()) == numbers
