"""Every architecture is planned and merged without a table of it, and what is written loads with nothing left over."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import logging

from mergekit_lr import merge, plan
from mergekit_lr.arch.modules import WHOLE, modules_of

from .layouts import LAYOUTS, save_layout
from .zoo import LAYERS, TRANSFORMERS, save_tiny

#: what mergekit 0.1.5 has a definition of (`_data/architectures`): its name there -> its name here
LISTED: dict[str, str] = {
    **{
        n: n
        for n in (
            *("apertus", "arcee", "baichuan", "bert", "bert-masked-lm", "chatglm", "cohere", "cohere2", "distilbert"),
            *("distilbert-masked-lm", "exaone", "falcon", "gemma", "gemma2", "glm4", "gpt2", "granite", "internlm2"),
            *("jais", "lfm2", "llama", "llama4", "mamba", "mistral", "mistral3", "mixtral", "olmo2", "phi3", "qwen"),
            *("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl", "roberta", "roberta-masked-lm"),
            *("solar", "starcoder2", "t5", "whisper"),
        )
    },
    "afmoe_partial": "afmoe",
    "bert-sequence-classification": "bert-classifier",
    "distilbert-sequence-classification": "distilbert-classifier",
    "distilbert-token-classification": "distilbert-tokens",
    "gemma3": "gemma3_text",
    "gemma3vl": "gemma3",
    "glm4moe": "glm4_moe",
    "gpt-neox": "gpt_neox",
    "gpt2-sequence-classification": "gpt2-classifier",
    "gptbigcode": "gpt_bigcode",
    "granite4moehybrid": "granitemoehybrid",
    "llama-sequence-classification": "llama-classifier",
    "phi-1": "mixformer-sequential",
    "phi2-old": "phi-msft",
    "phi2": "phi",
    "phi3-small": "phi3small",
    "qwen3_vl (mixture)": "qwen3_vl_moe",
    "roberta-sequence-classification": "roberta-classifier",
    "roberta-token-classification": "roberta-tokens",
    "stablelm": "stablelm_epoch",
    "stablelm2": "stablelm",
}

#: merged and loaded in the normal suite; the others under `slow`
QUICK = ("llama-tied", "qwen3_moe", "gpt2", "gemma3", "qwen2_5_vl", "t5", "whisper", "bert-masked-lm", "mamba", "lfm2")
slow = pytest.mark.slow
CASES = [pytest.param(n, marks=() if n in QUICK else slow) for n in TRANSFORMERS]


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load(name: str, folder: Path) -> Any:
    """The model that transformers makes of a folder; every tensor must have found its place."""
    kind = getattr(transformers, TRANSFORMERS[name][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert {key: sorted(found) for key, found in info.items() if found} == {}
    return model.eval()


def run(model: Any) -> None:
    """The text side of a model gives finite numbers."""
    tokens = torch.tensor([[3, 9, 4, 1]])
    config = model.config
    if config.model_type == "llama4":  # in transformers 5.24 it fails without a picture, whatever its weights
        model, config = model.language_model, config.text_config
    if config.model_type == "whisper":
        inputs = {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": tokens}
    elif config.model_type == "vit":
        inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    elif config.model_type == "clip":
        inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 16, 16)}
    elif "MultipleChoice" in type(model).__name__:
        inputs = {"input_ids": tokens[None]}
    else:
        inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})
    with torch.no_grad():
        found = model(**inputs)[0]
    assert torch.isfinite(found).all()


def test_every_listed_architecture_is_here() -> None:
    assert len(LISTED) == 62
    assert set(LISTED.values()) <= TRANSFORMERS.keys() | LAYOUTS.keys()


@pytest.mark.parametrize("name", CASES)
def test_merged_and_loaded(name: str, tmp_path: Path) -> None:
    """Mean of two models: names, tensors and bytes as the first has them, each the mean; nothing missing on loading."""
    a, b = (save_tiny(name, tmp_path / m, seed) for seed, m in enumerate("ab"))
    recipe = {"merge_method": "linear", "models": [{"model": str(m)} for m in (a, b)], "parameters": {"weight": 1}}
    laid_out = plan(recipe)
    merge(recipe, tmp_path / "out", device="cpu")
    got, one, two = (load_file(f / "model.safetensors") for f in (tmp_path / "out", a, b))
    assert got.keys() == one.keys() == {s.name for s in laid_out.graph.sinks}
    assert not laid_out.warnings
    for tensor in got:
        if got[tensor].is_floating_point():
            torch.testing.assert_close(got[tensor], (one[tensor] + two[tensor]) / 2)
    run(load(name, tmp_path / "out"))


@pytest.mark.parametrize("name", CASES)
def test_made_deeper_by_slices(name: str, tmp_path: Path) -> None:
    """Layers 0 to 3 and 2 to 3 again: config and lists follow, the model loads and runs."""
    model = str(save_tiny(name, tmp_path / "m"))
    parts = [{"sources": [{"model": model, "layer_range": r}]} for r in ([0, LAYERS], [2, LAYERS])]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    recipe: dict[str, Any] = {"merge_method": "passthrough", "slices": parts}
    deeper = ["num_hidden_layers", "n_layer", "n_layers", "num_layers"]
    if config.get("is_encoder_decoder"):
        recipe = {"merge_method": "passthrough", "base_model": model, "modules": {"decoder": {"slices": parts}}}
        deeper = ["decoder_layers", "num_decoder_layers"]
    merge(recipe, tmp_path / "out", device="cpu")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    counts = {k: v for c in (after.get("text_config", {}), after) for k, v in c.items() if k in deeper}
    assert LAYERS + 2 in counts.values()
    loaded = load(name, tmp_path / "out")
    if "Classification" not in TRANSFORMERS[name][0]:
        run(loaded)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_without_code(name: str, tmp_path: Path) -> None:
    a, b = (save_layout(name, tmp_path / m, seed) for seed, m in enumerate("ab"))
    recipe = {"merge_method": "linear", "models": [{"model": str(m)} for m in (a, b)], "parameters": {"weight": 1}}
    merge(recipe, tmp_path / "out", device="cpu")
    got, one, two = (load_file(f / "model.safetensors") for f in (tmp_path / "out", a, b))
    assert got.keys() == one.keys()
    for tensor in got:
        torch.testing.assert_close(got[tensor], (one[tensor] + two[tensor]) / 2)


MODULES = {
    "gemma3": {"text_decoder", "vision_tower", "multi_modal_projector"},
    "llama4": {"text_decoder", "vision_tower", "multi_modal_projector"},
    "mistral3": {"text_decoder", "vision_tower", "multi_modal_projector"},
    "qwen2_vl": {"text_decoder", "vision_tower", "multi_modal_projector"},
    "qwen2_5_vl": {"text_decoder", "vision_tower", "multi_modal_projector"},
    "qwen3_vl": {"text_decoder", "vision_tower", "multi_modal_projector"},
    "qwen3_vl_moe": {"text_decoder", "vision_tower", "multi_modal_projector"},
    "t5": {"encoder", "decoder", "shared"},
    "whisper": {"encoder", "decoder"},
    "llama": {WHOLE},
    "bert": {WHOLE},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else slow) for n in MODULES])
def test_the_modules_that_mergekit_lists(name: str, tmp_path: Path) -> None:
    """Its nine models of several parts have the same parts here, found from names alone."""
    folder = save_tiny(name, tmp_path / "m")
    parts = modules_of(load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text()))
    assert set(parts.values()) == MODULES[name]
    for tensor, part in parts.items():
        if re.search(r"(^|\.)(visual|vision)", tensor):
            assert part in ("vision_tower", "multi_modal_projector")
