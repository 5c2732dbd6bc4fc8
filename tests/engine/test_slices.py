"""Slices from end to end: which layer of which model becomes which, and that the result runs."""

from __future__ import annotations

import json

import pytest
import torch

from mergekit_lr import merge


@pytest.fixture
def stacks(make, random_tensors):
    """Two models of four layers each."""
    shapes = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (24, 16) for i in range(4)}
    config = {"model_type": "llama", "num_hidden_layers": 4}
    return [make(f"m{i}", random_tensors(i, shapes=shapes), config=config) for i in range(2)]


def source(model, start, stop, **parameters):
    entry = {"model": str(model), "layer_range": [start, stop]}
    return {**entry, "parameters": parameters} if parameters else entry


def test_stacked_layers_are_the_picked_ones(stacks, tmp_path, load):
    a, b = stacks
    slices = [{"sources": [source(a, 0, 3)]}, {"sources": [source(b, 1, 4)]}, {"sources": [source(b, 3, 4)]}]
    merge({"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}, tmp_path / "out", device="cpu")
    got, first, second = load(tmp_path / "out"), load(a), load(b)
    picked = [(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3), (second, 3)]
    for i, (model, layer) in enumerate(picked):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(got[name.format(i)], model[name.format(layer)])
    assert torch.equal(got["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(got["model.norm.weight"], second["model.norm.weight"])
    assert torch.equal(got["lm_head.weight"], second["lm_head.weight"])
    assert len(got) == 7 + 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 7


def test_the_classic_slerp_recipe_is_the_models_form_bit_for_bit(stacks, tmp_path, load):
    a, b = (str(m) for m in stacks)
    parameters = {"t": [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.5}]}
    rest = {"merge_method": "slerp", "base_model": a, "parameters": parameters, "dtype": "bfloat16"}
    sources = [source(a, 0, 4), source(b, 0, 4)]
    merge({**rest, "slices": [{"sources": sources}]}, tmp_path / "slices", device="cpu")
    merge({**rest, "models": [{"model": a}, {"model": b}]}, tmp_path / "models", device="cpu")
    one, other = load(tmp_path / "slices"), load(tmp_path / "models")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    base, tuned = load(stacks[0]), load(stacks[1])
    assert torch.equal(one["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(one["model.layers.3.mlp.up_proj.weight"], tuned["model.layers.3.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    "ranges", [[(0, 3), (0, 2)], [(0, 9), (0, 9)], [(3, 1), (3, 1)]], ids=["unequal", "beyond", "backwards"]
)
def test_ranges_that_make_no_sense_are_refused(stacks, tmp_path, ranges):
    from mergekit_lr.errors import MergekitLrError

    sources = [source(m, *r, weight=0.5) for m, r in zip(stacks, ranges, strict=True)]
    with pytest.raises(MergekitLrError) as e:
        merge({"merge_method": "linear", "slices": [{"sources": sources}]}, tmp_path / "out", device="cpu")
    assert e.value.exit_code in (3, 4)
    assert not (tmp_path / "out").exists()


def test_a_deeper_model_loads_and_generates(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    small = str(tmp_path / "small")
    slices = [{"sources": [source(small, 0, 2)]}, {"sources": [source(small, 1, 3)]}]
    merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "deep", device="cpu")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "deep", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
