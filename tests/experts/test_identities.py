"""What must hold whatever the numbers: equal experts, full rank, and MergeMoE's fit against least squares by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import EXAMPLES, TEXTS
from .test_outputs import Recipes, loaded, logits, run

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("sub_moe", {}),
    ("sub_moe", {"clustering": "average"}),
    ("sub_moe", {"rank": 16}),  # the rank of equal experts' union
    ("m_smoe", {}),
    ("hc_smoe", {}),
    ("mergemoe", {"ridge": 0.1}),
    ("ream", {}),
    ("expert_merge", {"grouping": "random", "merge": "aligned"}),
]


@pytest.fixture(scope="module")
def equal_experts(recipe_of: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose experts are all expert 0: whatever is routed where, its layers give the same."""
    source = Path(recipe_of("mixtral", "reap", 4)["models"][0]["model"])
    folder = tmp_path_factory.mktemp("equal")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        head, mark, rest = name.partition(".experts.")
        if mark:
            tensors[name] = tensors[f"{head}.experts.0.{rest.partition('.')[2]}"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_merging_equal_experts_gives_the_function_back(
    method: str, parameters: dict[str, Any], equal_experts: Path, tmp_path: Path
) -> None:
    recipe = {
        "merge_method": method,
        "models": [{"model": str(equal_experts)}],
        "parameters": {"num_experts": 3, **parameters},
        "calibration": {"text": [str(TEXTS[0])], "samples": 4, "sequence_length": 32},
    }
    run(recipe, tmp_path / "out")
    want = logits(AutoModelForCausalLM.from_pretrained(equal_experts).eval())
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), want, rtol=1e-3, atol=1e-4)


def test_full_rank_equals_the_frequency_average_and_a_rank_that_is_full(recipe_of: Recipes, tmp_path: Path) -> None:
    run(recipe_of("qwen3_moe", "sub_moe", 3), tmp_path / "full")
    run(recipe_of("qwen3_moe", "sub_moe", 3, rank=32), tmp_path / "all")  # of 16 or 32 directions
    run(recipe_of("qwen3_moe", "sub_moe", 3, rank=0.25), tmp_path / "few")
    found = {n: load_file(tmp_path / n / "model.safetensors") for n in ("full", "all", "few")}
    moved = 0
    for name, want in found["full"].items():
        torch.testing.assert_close(found["all"][name], want, rtol=1e-6, atol=1e-6)
        moved += not torch.equal(found["few"][name], want)
    assert moved >= 6


def test_mergemoe_is_least_squares_on_the_layers_inputs(recipe_of: Recipes, tmp_path: Path) -> None:
    """The fitted down projection of layer 0 against float64 lstsq on inputs caught by a hook."""
    recipe = recipe_of("mixtral", "mergemoe", 3, ridge=0)
    recipe["calibration"] |= {"text": [str(t) for t in TEXTS], "samples": 8, "sequence_length": 48}
    report = run(recipe, tmp_path / "out")
    source = Path(recipe["models"][0]["model"])
    caught: list[torch.Tensor] = []
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: caught.append(args[0].reshape(-1, 32)))
    from mergekit_lr.calibration.text import read_windows

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "models" / "base")
    windows = read_windows(tokenizer, TEXTS, samples=8, sequence_length=48, seed=0)
    with torch.inference_mode():
        for batch in windows.batches():
            model(batch.ids)
    x = torch.cat(caught).double()
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    stem, silu = "model.layers.0.block_sparse_moe.experts", torch.nn.functional.silu
    layer = report["details"]["layers"]["model.layers.0.block_sparse_moe"]
    merged = [(j, g) for j, g in enumerate(layer["groups"]) if len(g["members"]) > 1]
    assert merged
    for j, g in merged:

        def weight(e: int, w: str) -> torch.Tensor:
            return old[f"{stem}.{e}.{w}.weight"].double()

        pairs = list(zip(g["members"], g["shares"], strict=True))
        gate, up, down = (sum(f * weight(e, w) for e, f in pairs) for w in ("w1", "w3", "w2"))
        hidden = silu(x @ gate.T) * (x @ up.T)
        outputs = [f * (silu(x @ weight(e, "w1").T) * (x @ weight(e, "w3").T)) @ weight(e, "w2").T for e, f in pairs]
        target = torch.stack(outputs).sum(0)
        want = torch.linalg.lstsq(hidden, target).solution.T
        got = new[f"{stem}.{j}.w2.weight"].double()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        errors = g["relative_error"]
        for d, error in ((down, errors["average"]), (want, errors["fitted"])):
            assert float((hidden @ d.T - target).norm() / target.norm()) == pytest.approx(error, rel=1e-3, abs=1e-4)
        assert errors["fitted"] < errors["average"]
