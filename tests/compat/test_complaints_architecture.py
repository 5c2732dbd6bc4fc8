"""What users of mergekit reported about architectures, tied weights, mixtures and models that see.

Each test is named by numbers of issues in arcee-ai/mergekit. The right output, or a refusal that says what is wrong:
never a wrong output, and never half of one. Layouts are made up in the shape of those in the issue.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lr import merge, plan
from mergekit_lr.errors import CheckpointError

from ..architectures.layouts import save_layout, tensors_of, write

LAYERS = 4
TEXT = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.#.self_attn.q_proj.weight": (8, 8),
    "model.layers.#.mlp.up_proj.weight": (12, 8),
    "model.norm.weight": (8,),
}
HEAD = {"lm_head.weight": (16, 8)}
SEES = {
    "visual.patch_embed.proj.weight": (8, 3, 2, 2),
    "visual.blocks.0.attn.qkv.weight": (24, 8),
    "visual.merger.mlp.0.weight": (8, 8),
}
CONFIG = {"model_type": "made_up", "num_hidden_layers": LAYERS}
EXPERTS = {f"model.layers.#.mlp.experts.{e}.up_proj.weight": (4, 8) for e in range(3)}
ROUTER = {"model.layers.#.mlp.gate.weight": (3, 8)}


def make(root: Path, name: str, sizes: dict[str, tuple[int, ...]], seed: int = 0, **config: Any) -> str:
    return str(write(root / name, {**CONFIG, **config}, tensors_of(sizes, seed)))


def linear(*models: str, **more: Any) -> dict[str, Any]:
    listed = [{"model": m, "parameters": {"weight": 1}} for m in models]
    return {"merge_method": "linear", "models": listed, **more}


def merged(recipe: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    merge(recipe, out, device="cpu")
    return load_file(out / "model.safetensors")


def mean_of(*models: str) -> dict[str, torch.Tensor]:
    loaded = [load_file(f"{m}/model.safetensors") for m in models]
    return {n: sum(m[n] for m in loaded) / len(loaded) for n in loaded[0]}  # type: ignore[misc]


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "kind",
    ["qwen3_5", "qwen3_next", "gpt_oss", "kimi_linear", "an_architecture_of_next_year"],
)
def test_669_671_672_625_584_652_424_an_architecture_that_nobody_listed(tmp_path: Path, kind: str) -> None:
    """No table to wait for: names come from the files, whatever config.json calls the model."""
    sizes = (
        TEXT | HEAD | {"model.layers.#.linear_attn.A_log": (4,), "model.layers.#.linear_attn.conv1d.weight": (8, 1, 4)}
    )
    a, b = (make(tmp_path, n, sizes, i, model_type=kind) for i, n in enumerate("ab"))
    same(merged(linear(a, b), tmp_path / "out"), mean_of(a, b))


def test_607_537_internvl(tmp_path: Path) -> None:
    """A model that sees, whose config has llm_config and whose code transformers does not have."""
    a, b = (str(save_layout("internvl", tmp_path / n, i)) for i, n in enumerate("ab"))
    same(merged(linear(a, b), tmp_path / "whole"), mean_of(a, b))
    text = {"merge_method": "linear", "base_model": a, "modules": {"text_decoder": linear(a, b)}}
    del text["modules"]["text_decoder"]["merge_method"]  # type: ignore[index]
    got = merged(text, tmp_path / "text")
    mean, own = mean_of(a, b), load_file(f"{a}/model.safetensors")
    same(got, {n: mean[n] if n.startswith("language_model.") else own[n] for n in own})


def test_614_vocabularies_of_two_sizes(tmp_path: Path) -> None:
    """49160 rows against 50304: refused before anything is written, and both sizes are told."""
    a = make(tmp_path, "a", TEXT | HEAD)
    b = make(tmp_path, "b", TEXT | HEAD | {"model.embed_tokens.weight": (20, 8), "lm_head.weight": (20, 8)})
    with pytest.raises(CheckpointError) as caught:
        plan(linear(a, b))
    assert "[20, 8] where" in caught.value.problems[0]
    assert "vocabularies differ" in caught.value.problems[0]


@pytest.mark.parametrize("optional", ["model.layers.#.self_attn.q_norm.weight", "model.layers.#.self_attn.q_proj.bias"])
def test_239_284_398_643_576_a_tensor_that_one_of_the_models_has(tmp_path: Path, optional: str) -> None:
    """Optional norms and biases: merged where all have them, an error that names model and tensor where not."""
    a, b = (make(tmp_path, n, TEXT | HEAD | {optional: (8,)}, i) for i, n in enumerate("ab"))
    without = make(tmp_path, "c", TEXT | HEAD)
    same(merged(linear(a, b), tmp_path / "out"), mean_of(a, b))
    name = optional.replace("#", "0")
    with pytest.raises(CheckpointError, match=f"c: tensor '{name}' is missing"):
        plan(linear(a, without))
    laid_out = plan(linear(without, a))  # the other way round it has no place in the output, and is named
    assert any(name in w and "not merged" in w for w in laid_out.warnings)


def test_239_rotary_buffers_of_old_files(tmp_path: Path) -> None:
    """inv_freq, which old files store and new ones do not."""
    old = make(tmp_path, "old", TEXT | HEAD | {"model.layers.#.self_attn.rotary_emb.inv_freq": (4,)})
    new = make(tmp_path, "new", TEXT | HEAD, 1)
    got = merged(linear(new, old), tmp_path / "out")
    assert got.keys() == load_file(f"{new}/model.safetensors").keys()


def test_390_385_632_615_tied_heads_are_not_written(tmp_path: Path) -> None:
    """A tied model stays as many parameters as it was, also where another input stores an equal head."""
    tied = {"tie_word_embeddings": True}
    a, b = (make(tmp_path, n, TEXT, i, **tied) for i, n in enumerate("ab"))
    got = merged(linear(a, b), tmp_path / "out")
    assert "lm_head.weight" not in got
    same(got, mean_of(a, b))
    stored = load_file(f"{b}/model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    c = str(write(tmp_path / "c", {**CONFIG, **tied}, stored))
    assert "lm_head.weight" not in merged(linear(a, c), tmp_path / "with-head")
    # as the base has it: with a base that stores the head, the tied model's embeddings count as its head
    head = merged(linear(c, a), tmp_path / "head-first")["lm_head.weight"]
    torch.testing.assert_close(head, got["model.embed_tokens.weight"])


def test_385_a_head_that_would_be_lost_is_an_error(tmp_path: Path) -> None:
    tied = make(tmp_path, "tied", TEXT, tie_word_embeddings=True)
    untied = make(tmp_path, "untied", TEXT | HEAD, 1, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"differs from the model's embeddings"):
        merge(linear(tied, untied), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_632_a_model_that_sees_and_ties_in_its_text_config(tmp_path: Path) -> None:
    """Gemma 3 of 27B became 28.8B: the tie is in text_config, or left to the default of the class."""
    names = {n.replace("model.", "language_model.model.", 1): s for n, s in TEXT.items()} | SEES
    config = {"text_config": {"num_hidden_layers": LAYERS, "tie_word_embeddings": True}}
    a, b = (make(tmp_path, n, names, i, **config) for i, n in enumerate("ab"))
    got = merged(linear(a, b), tmp_path / "out")
    same(got, mean_of(a, b))


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_582_626_134_427_512_mixtures_are_merged_expert_by_expert(tmp_path: Path, kind: str) -> None:
    """In the layout that they are stored in, the correction bias and a layer for the next token but one included."""
    sizes = TEXT | HEAD | EXPERTS | ROUTER | {"model.layers.#.mlp.gate.e_score_correction_bias": (3,)}
    sizes |= {f"model.layers.{LAYERS}.eh_proj.weight": (8, 16)}
    counts = {"n_routed_experts" if kind.startswith("deepseek") else "num_experts": 3}
    a, b = (
        make(tmp_path, n, sizes, i, model_type=kind, num_nextn_predict_layers=1, **counts) for i, n in enumerate("ab")
    )
    same(merged(linear(a, b), tmp_path / "out"), mean_of(a, b))
    slices = [{"sources": [{"model": a, "layer_range": [0, 2]}]}]
    with pytest.raises(CheckpointError, match=r"1 layer after those for tokens beyond the next one"):
        plan({"merge_method": "passthrough", "slices": slices})


def test_582_626_692_fused_and_separate_experts_are_told_apart(tmp_path: Path) -> None:
    a = make(tmp_path, "a", TEXT | HEAD | EXPERTS | ROUTER)
    b = make(tmp_path, "b", TEXT | HEAD | ROUTER | {"model.layers.#.mlp.experts.gate_up_proj": (3, 8, 8)})
    for first, second in ((a, b), (b, a)):
        with pytest.raises(CheckpointError, match=r"which keeps experts as .*: save both models in one layout"):
            plan(linear(first, second))


@pytest.mark.parametrize("fused", [False, True])
def test_692_the_layout_on_disk_is_kept(tmp_path: Path, fused: bool) -> None:
    experts = {"model.layers.#.mlp.experts.gate_up_proj": (3, 8, 8)} if fused else EXPERTS
    a, b = (make(tmp_path, n, TEXT | experts | ROUTER, i) for i, n in enumerate("ab"))
    assert merged(linear(a, b), tmp_path / "out").keys() == load_file(f"{a}/model.safetensors").keys()


def test_352_145_a_mixture_of_a_kind_that_cannot_be_built(tmp_path: Path) -> None:
    """Gemma and Phi came out as gibberish; here it is said which models a mixture can be made of."""
    mlp = {f"model.layers.#.mlp.{m}_proj.weight": (12, 8) for m in ("gate", "up")}
    a = make(tmp_path, "a", TEXT | mlp | {"model.layers.#.mlp.down_proj.weight": (8, 12)}, model_type="gemma")
    models = [{"model": a, "parameters": {"positive_prompts": [p]}} for p in ("one", "two")]
    with pytest.raises(CheckpointError, match=r"no mixture can be built .*type 'gemma'.*mixtral from llama"):
        plan({"merge_method": "moe_build", "base_model": a, "models": models})


def test_434_319_576_a_language_model_into_one_that_sees(tmp_path: Path) -> None:
    """The towers, which the language model has not, neither vanish nor stop the merge of what both have."""
    a = make(tmp_path, "a", TEXT | HEAD | SEES, text_config={"num_hidden_layers": LAYERS})
    b = make(tmp_path, "b", TEXT | HEAD, 1)
    with pytest.raises(CheckpointError, match=r"it has no vision_tower .* merge under `modules: \{text_decoder"):
        plan(linear(a, b))
    own = linear(a, b)
    text = {"merge_method": "linear", "base_model": a, "modules": {"text_decoder": {"models": own["models"]}}}
    got = merged(text, tmp_path / "out")
    first, second = load_file(f"{a}/model.safetensors"), load_file(f"{b}/model.safetensors")
    same(got, {n: (t + second[n]) / 2 if n in second else t for n, t in first.items()})
    rules = {t["name"]: t["rule"] for t in json.loads((tmp_path / "out/merge_report.json").read_text())["tensors"]}
    assert {rules[n] for n in SEES} == {"copied: no module of the recipe speaks of it"}


def test_537_two_releases_of_transformers_wrote_two_sets_of_names(tmp_path: Path) -> None:
    old = {n.replace("model.", "language_model.model.", 1): s for n, s in TEXT.items()} | {
        "language_model.lm_head.weight": (16, 8),
        "vision_tower.vision_model.encoder.layers.0.w.weight": (8, 8),
        "multi_modal_projector.linear.weight": (8, 8),
    }
    new = {n.replace("model.", "model.language_model.", 1): s for n, s in TEXT.items()} | {
        "lm_head.weight": (16, 8),
        "model.vision_tower.encoder.layers.0.w.weight": (8, 8),
        "model.multi_modal_projector.linear.weight": (8, 8),
    }
    config = {"text_config": {"num_hidden_layers": LAYERS}}
    a, b = make(tmp_path, "a", old, 0, **config), make(tmp_path, "b", new, 1, **config)
    got = merged(linear(a, b), tmp_path / "out")
    first, second = load_file(f"{a}/model.safetensors"), load_file(f"{b}/model.safetensors")
    renamed = {
        n.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower.", "vision_tower.vision_model.")
        .replace("model.multi_modal", "multi_modal"): t
        for n, t in second.items()
    }
    renamed["language_model.lm_head.weight"] = renamed.pop("lm_head.weight")
    same(got, {n: (t + renamed[n]) / 2 for n, t in first.items()})


def test_576_the_number_of_parameters_stays(tmp_path: Path) -> None:
    """Vision and projector were missing from outputs. Every tensor of the base is in the output, or named."""
    a, b = (
        make(tmp_path, n, TEXT | HEAD | SEES, i, text_config={"num_hidden_layers": LAYERS}) for i, n in enumerate("ab")
    )
    slices = [{"sources": [{"model": a, "layer_range": [0, 3]}]}, {"sources": [{"model": b, "layer_range": [1, 4]}]}]
    got = merged({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    assert set(SEES) <= got.keys()
    assert sum(t.numel() for t in got.values()) == sum(
        t.numel() for t in load_file(f"{a}/model.safetensors").values()
    ) + 2 * (8 * 8 + 12 * 8)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 6
