"""Mixtures built from dense models: what the model computes, where gates come from, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergekit_lr
from mergekit_lr import load_recipe, merge, plan
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.experts.gates import random_gate
from mergekit_lr.recipe.moe_file import load_moe

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
SIZES = {"vocab_size": 1536, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
DENSE = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
PROMPTS = [["def main():", "import os"], ["int main(void) {", "#include"], ["Die Stadt am Fluss", "Es war einmal"]]


def dense(kind: str, folder: Path, seed: int = 0, **more: Any) -> Path:
    """A random dense model with the examples' tokenizer."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{DENSE[kind]}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{DENSE[kind]}ForCausalLM")(config)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "base" / name, folder / name)
    return folder


def expert(model: Path | str, prompts: list[str] | None = None, **more: Any) -> dict[str, Any]:
    parameters = {**({"positive_prompts": prompts} if prompts else {}), **more}
    return {"model": str(model), "parameters": parameters}


def recipe(base: Path | str, models: list[dict[str, Any]], **parameters: Any) -> dict[str, Any]:
    return {"merge_method": "moe_build", "base_model": str(base), "models": models, "parameters": parameters}


def loaded(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert {k: sorted(v) for k, v in info.items() if v} == {}
    return model.eval()


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return loaded(folder)(torch.tensor([[5, 300, 7, 1200, 44, 9]])).logits


@pytest.mark.parametrize(
    ("kind", "architecture", "output"),
    [
        ("llama", None, "mixtral"),
        ("mistral", "Mixtral", "mixtral"),
        ("llama", "Qwen MoE", "qwen2_moe"),
        ("qwen2", None, "qwen2_moe"),
        ("qwen3", None, "qwen3_moe"),
    ],
)
def test_equal_experts_are_the_dense_model_whatever_the_gates(
    tmp_path: Path, kind: str, architecture: str | None, output: str
) -> None:
    """Gates of the chosen experts add up to one, so equal experts give what one gives. A shared expert, which is
    added to that, must then give nothing."""
    base = dense(kind, tmp_path / "base")
    models = [expert(base) for _ in range(4)]
    if output == "qwen2_moe":
        models.append(expert(base, shared=True, residual_scale=0.0))
    more = {} if architecture is None else {"architecture": architecture}
    result = merge(recipe(base, models, gate_mode="random", **more), tmp_path / "out", device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == output
    assert any("all experts are one model" in w for w in result.report["warnings"])
    torch.testing.assert_close(logits(tmp_path / "out"), logits(base), rtol=1e-4, atol=1e-5)


def test_each_tensor_comes_from_where_it_should(tmp_path: Path) -> None:
    names = ("base", "python", "c", "german")
    models = [expert(EXAMPLES / n, PROMPTS[i]) for i, n in enumerate(names[1:])]
    result = merge(recipe(EXAMPLES / "base", models), tmp_path / "out", device="cpu")
    got = load_file(tmp_path / "out" / "model.safetensors")
    inputs = {}
    for n in names:
        inputs[n] = {k: v for f in sorted((EXAMPLES / n).glob("*.safetensors")) for k, v in load_file(f).items()}
    for layer in range(4):
        for e, n in enumerate(names[1:]):
            for theirs, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                found = got.pop(f"model.layers.{layer}.block_sparse_moe.experts.{e}.{ours}.weight")
                assert torch.equal(found, inputs[n][f"model.layers.{layer}.mlp.{theirs}.weight"])
        gate = got.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        torch.testing.assert_close(gate.float().norm(dim=1), torch.ones(3), rtol=0, atol=5e-3)
    assert got.keys() == {n for n in inputs["base"] if ".mlp." not in n}
    assert all(torch.equal(t, inputs["base"][n]) for n, t in got.items())
    assert any("no power of two" in w for w in result.report["warnings"])
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_gates_are_hidden_states_of_the_base(tmp_path: Path, mode: str) -> None:
    """Against transformers, prompt by prompt, so that nothing is padded."""
    base = dense("llama", tmp_path / "base")
    negative = ["something else entirely"]
    models = [expert(base, PROMPTS[0]), expert(base, PROMPTS[1], negative_prompts=negative)]
    models[0]["parameters"]["noise_scale"] = 0.01
    merge(recipe(base, models, gate_mode=mode), tmp_path / "out", device="cpu")
    got = load_file(tmp_path / "out" / "model.safetensors")
    network = loaded(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    def state(prompt: str, layer: int) -> torch.Tensor:
        ids = tokenizer((tokenizer.bos_token or "") + prompt, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            h = network(ids, output_hidden_states=True).hidden_states[0 if mode == "cheap_embed" else layer][0]
        return {"hidden": h[-1], "hidden_avg": h.mean(0), "cheap_embed": h.sum(0)}[mode].double()

    def side(prompts: list[str], layer: int) -> torch.Tensor:
        total = sum(state(p, layer) for p in prompts)
        assert isinstance(total, torch.Tensor)
        return total / total.norm() if mode == "cheap_embed" else total / len(prompts)

    for layer in range(2):
        one, two = side(PROMPTS[0], layer), side(PROMPTS[1], layer) - side(negative, layer)
        expected = torch.stack([one / one.norm(), two / two.norm()]).float()
        found = got[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_random_gates_and_noise_are_decided_by_the_seed(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    other = dense("llama", tmp_path / "other", seed=1)
    models = [expert(base, noise_scale=0.5), expert(other, residual_scale=3.0)]
    asked = recipe(base, models, gate_mode="uniform_random")
    runs: dict[str, dict[str, torch.Tensor]] = {}
    for name, more in {"a": {}, "b": {}, "c": {"seed": 1}}.items():
        settings: dict[str, Any] = {"threads": 1, "max_memory": "64MiB"} if name == "b" else {"threads": 2}
        merge({**asked, **more}, tmp_path / name, device="cpu", **settings)
        runs[name] = load_file(tmp_path / name / "model.safetensors")
    assert all(torch.equal(runs["a"][n], runs["b"][n]) for n in runs["a"])
    block = "model.layers.1.block_sparse_moe"
    for changed in (f"{block}.gate.weight", f"{block}.experts.0.w1.weight"):
        assert not torch.equal(runs["a"][changed], runs["c"][changed])
    gate = runs["a"][f"{block}.gate.weight"]
    assert gate.abs().max() <= 32**-0.5
    assert not torch.equal(gate, runs["a"]["model.layers.0.block_sparse_moe.gate.weight"])
    first, second = (load_file(m / "model.safetensors") for m in (base, other))
    noise = runs["a"][f"{block}.experts.0.w1.weight"] - first["model.layers.1.mlp.gate_proj.weight"]
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.05)
    down = runs["a"][f"{block}.experts.1.w2.weight"]
    assert torch.equal(down, second["model.layers.1.mlp.down_proj.weight"] * 3)
    assert torch.equal(runs["a"][f"{block}.experts.1.w3.weight"], second["model.layers.1.mlp.up_proj.weight"])


def test_random_gates_have_the_moments_that_they_should() -> None:
    normal, uniform = random_gate(1, (64, 256), uniform=False), random_gate(1, (64, 256), uniform=True)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    assert uniform.std().item() == pytest.approx((1 / 3) ** 0.5 / 16, rel=0.02)


def test_deepseek_with_a_shared_expert(tmp_path: Path) -> None:
    """Its names and numbers; transformers has no code for it, and the output says so."""
    base, other = dense("llama", tmp_path / "base"), dense("llama", tmp_path / "other", seed=1)
    models = [expert(base), expert(other), expert(base, shared=True)]
    asked = recipe(base, models, gate_mode="random", architecture="deepseek", experts_per_token=1)
    result = merge({**asked, "dtype": "bfloat16"}, tmp_path / "out", device="cpu")
    got = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_routed_experts"], config["n_shared_experts"], config["num_experts_per_tok"]) == (2, 1, 1)
    assert got["model.layers.0.mlp.experts.1.up_proj.weight"].dtype == torch.bfloat16
    assert torch.equal(
        got["model.layers.1.mlp.shared_experts.down_proj.weight"],
        load_file(base / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].bfloat16(),
    )
    assert any("transformers has no code" in w for w in result.report["warnings"])


def test_prompts_that_are_too_much_alike(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    text = "the one and the other and what stands between them in the middle of it all"
    models = [expert(base, [text], noise_scale=0.1), expert(base, [text + " too"])]
    result = merge(recipe(base, models, gate_mode="cheap_embed"), tmp_path / "out", device="cpu")
    assert any("nearly dependent" in w for w in result.report["warnings"])


def test_a_plan_runs_no_model(tmp_path: Path) -> None:
    base = dense("llama", tmp_path / "base")
    (base / "tokenizer.json").unlink()
    laid_out = plan(recipe(base, [expert(base, PROMPTS[0]), expert(base, PROMPTS[1])]))
    assert any("a plan does not do that" in w for w in laid_out.warnings)
    assert "model.layers.0.block_sparse_moe.gate.weight" in {s.name for s in laid_out.graph.sinks}


@pytest.mark.parametrize(
    ("models", "parameters", "message"),
    [
        ([{}, {}], {}, "expert 0 has no positive_prompts"),
        ([{"positive_prompts": ["a"]}, {"positive_prompts": ["a"]}], {}, "have the same prompts"),
        ([{}], {"gate_mode": "random"}, "experts_per_token is 2, and there are 1"),
        ([{"shared": True}], {"gate_mode": "random"}, "no expert is listed"),
        ([{}, {}], {"gate_mode": "random", "architecture": "Mixtrl"}, "no architecture 'Mixtrl'"),
        ([{}, {}], {"gate_mode": "cheap"}, "gate_mode"),
    ],
)
def test_what_is_wrong_with_the_recipe_alone(
    models: list[dict[str, Any]], parameters: dict[str, Any], message: str
) -> None:
    listed = [{"model": f"./{i}", "parameters": p} for i, p in enumerate(models)]
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe("./base", listed, **parameters))
    assert message in " ".join(caught.value.problems)


def test_what_is_wrong_with_the_models(tmp_path: Path) -> None:
    base, wide = dense("llama", tmp_path / "base"), dense("llama", tmp_path / "wide", intermediate_size=64)
    other = dense("qwen3", tmp_path / "other")
    for models, more, message in (
        ([expert(base), expert(wide)], {}, r"down_proj.weight' has shape \[32, 64\] where"),
        ([expert(base), expert(other)], {}, "experts must be of the base's architecture"),
        (
            [expert(base), expert(base), expert(base, shared=True)],
            {"architecture": "mixtral"},
            "no mixtral can be built",
        ),
        ([expert(base), expert(base)], {"architecture": "qwen3_moe"}, "no qwen3_moe can be built"),
    ):
        with pytest.raises(CheckpointError, match=message):
            merge(recipe(base, models, gate_mode="random", **more), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


MERGEKIT = """\
base_model: {base}
gate_mode: hidden
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: {python}
    positive_prompts:
      - "def main():"
    # negative_prompts:
  - source_model: {c}
    positive_prompts:
      - "int main(void)"
    negative_prompts:
      - "def main():"
shared_experts: null
"""


def test_a_file_for_mergekit_moe_runs_as_it_is(tmp_path: Path) -> None:
    text = MERGEKIT.format(**{n: EXAMPLES / n for n in ("base", "python", "c")})
    (tmp_path / "moe.yml").write_text(text)
    mergekit_lr.moe(tmp_path / "moe.yml", tmp_path / "out", device="cpu")
    models = [expert(EXAMPLES / "python", ["def main():"])]
    models.append(expert(EXAMPLES / "c", ["int main(void)"], negative_prompts=["def main():"]))
    same = {**recipe(EXAMPLES / "base", models, gate_mode="hidden"), "dtype": "bfloat16"}
    assert load_moe(tmp_path / "moe.yml").digest() == load_recipe(same).digest()
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("gate_mode: hidden", "moe.yml:2:1: gate_mod: unknown key; did you mean 'gate_mode'?"),
        ('    positive_prompts:\n      - "int', "experts[1].positive_prompt: unknown key"),
        ("  - source_model: ./c", "experts[1]: names no source_model"),
        ("shared_experts: null", "moe.yml:15:17: shared_experts: must be a list"),
    ],
)
def test_faults_in_such_a_file_are_told_at_their_place(tmp_path: Path, wrong: str, message: str) -> None:
    text = MERGEKIT.format(base="./base", python="./python", c="./c")
    assert wrong in text
    worse = {
        "gate_mode: hidden": "gate_mod: hidden",
        "  - source_model: ./c": "  - source_modl: ./c",
        "shared_experts: null": "shared_experts: 3",
    }.get(wrong, wrong.replace("prompts", "prompt"))
    path = tmp_path / "moe.yml"
    path.write_text(text.replace(wrong, worse))
    with pytest.raises(RecipeError) as caught:
        load_moe(path)
    assert message in "\n".join(caught.value.problems)


def test_the_page_shows_what_was_measured() -> None:
    root = Path(__file__).parents[2]
    rows = json.loads((root / "benchmarks" / "results" / "moe_building.json").read_text())["losses"]
    page = (root / "docs" / "moe_building.md").read_text()
    for name, losses in rows.items():
        assert f"| {name} | {' | '.join(f'{x:.3f}' for x in losses.values())} |" in page
