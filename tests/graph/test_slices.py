"""Slices from end to end: which layer goes where, what the config says, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_lr import merge
from mergekit_lr.arch.by_layer import relayered
from mergekit_lr.arch.stack import main_stack, precedes_layers
from mergekit_lr.errors import CheckpointError

LAYERS = 4


def write(root: Path, name: str, number: int, **config: Any) -> Path:
    """A model whose every tensor tells model and layer: 100 * number + layer (90 embeddings, 91 norm, 92 head)."""
    values = {
        f"model.layers.{i}.{part}.weight": i for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj")
    }
    values |= {"model.embed_tokens.weight": 90, "model.norm.weight": 91, "lm_head.weight": 92}
    folder = root / name
    folder.mkdir()
    tensors = {n: torch.full((3, 2), 100.0 * number + v) for n, v in values.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    facts = {"model_type": "llama", "num_hidden_layers": LAYERS, **config}
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate("abc", 1):
        write(tmp_path, name, number)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def part(*sources: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    return {"sources": [{"model": f"./{m}", "layer_range": [a, b]} for m, a, b in sources], **more}


def run(recipe: dict[str, Any], out: str) -> dict[str, float]:
    """The one value that each output tensor holds."""
    merge(recipe, out, device="cpu")
    return {n: t.unique().item() for n, t in load_file(f"{out}/model.safetensors").items()}


def attention(got: dict[str, float]) -> list[float]:
    count = sum("q_proj" in n for n in got)
    return [got[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(count)]


def test_a_stack_of_layers_from_two_models(models: Path) -> None:
    recipe = {"merge_method": "passthrough", "slices": [part(("a", 0, 3)), part(("b", 1, 4)), part(("a", 2, 3))]}
    got = run(recipe, "out")
    assert attention(got) == [100, 101, 102, 201, 202, 203, 102]
    assert (got["model.embed_tokens.weight"], got["model.norm.weight"], got["lm_head.weight"]) == (190, 191, 192)
    assert json.loads(Path("out/config.json").read_text())["num_hidden_layers"] == 7
    report = json.loads(Path("out/merge_report.json").read_text())
    left = {(d["model"], d["tensor"]) for d in report["dropped"]}
    assert ("./a", "model.layers.3.mlp.up_proj.weight") in left
    assert ("./b", "model.embed_tokens.weight") in left
    assert {d["rule"] for d in report["dropped"]} == {"outside the slices"}
    assert report["warnings"] == []


def test_the_head_comes_from_the_last_slice(models: Path) -> None:
    got = run({"merge_method": "passthrough", "slices": [part(("a", 0, 1)), part(("b", 3, 4))]}, "out")
    assert (got["model.embed_tokens.weight"], got["model.norm.weight"], got["lm_head.weight"]) == (190, 291, 292)
    assert attention(got) == [100, 203]


def test_gradients_restart_filters_look_at_the_source_and_scopes_have_an_order(models: Path) -> None:
    """Linear without normalisation: the output is the sum of weight times a number that names model and layer."""
    first = part(("a", 0, 3), parameters={"weight": [0.0, 1.0]})
    second = part(("a", 2, 3), ("b", 1, 2))
    second["sources"][1]["parameters"] = {"weight": {"filter": "layers.1.", "value": 0.5}}
    recipe = {
        "merge_method": "linear",
        "slices": [first, second],
        "parameters": {"weight": 2.0, "normalize": False},
    }
    got = run(recipe, "out")
    # t = 0, 1/2, 1 in the first slice; b's layer 1 has weight 1/2 under its own name, as the output's layer 3
    assert attention(got) == [0, 0.5 * 101, 102, 2 * 102 + 0.5 * 201]
    assert got["model.embed_tokens.weight"] == 0  # the first value of the first slice's gradient
    assert got["model.norm.weight"] == 2 * (191 + 291)


def test_the_classic_slerp_recipe(models: Path) -> None:
    """Colinear tensors: slerp is linear there, so the values can be worked out by hand."""
    t = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
    recipe = {
        "merge_method": "slerp",
        "base_model": "./a",
        "slices": [part(("a", 0, 4), ("b", 0, 4))],
        "parameters": {"t": t},
    }
    got = run(recipe, "out")
    assert attention(got) == pytest.approx([100 + i + 100 * i / 3 for i in range(4)], rel=1e-6)
    mlp = [got[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)]
    assert mlp == pytest.approx([100 + i + 100 * (1 - i / 3) for i in range(4)], rel=1e-6)
    assert got["model.norm.weight"] == pytest.approx(241, rel=1e-6)


def test_a_slice_may_have_a_base_of_its_own(models: Path) -> None:
    slices = [part(("a", 0, 1), ("b", 0, 1)), part(("b", 2, 3), ("c", 3, 4), base_model="./b")]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "./a",
        "slices": slices,
        "parameters": {"weight": 0.5},
    }
    got = run(recipe, "out")
    assert attention(got) == [150, 202 + 0.5 * (303 - 202)]
    assert (got["model.embed_tokens.weight"], got["model.norm.weight"]) == (240, 341)


@pytest.mark.parametrize("method", ["linear", "dare_ties", "slerp", "karcher"])
def test_one_slice_over_everything_is_the_whole_models(models: Path, method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    for name in "ab":
        path = Path(name) / "model.safetensors"
        save_file({n: torch.randn(64, 5, generator=generator) for n in load_file(path)}, path, {"format": "pt"})
    parameters: dict[str, Any] = {
        "linear": {"weight": [0.2, 0.9]},
        "dare_ties": {"weight": [0.2, 0.9], "density": 0.5},
        "slerp": {"t": [0, 1]},
        "karcher": {},
    }[method]
    shared = {"merge_method": method, "base_model": "./a", "parameters": parameters}
    merge({**shared, "slices": [part(("a", 0, 4), ("b", 0, 4))]}, "sliced", device="cpu")
    merge({**shared, "models": [{"model": "./a"}, {"model": "./b"}]}, "whole", device="cpu")
    for file in ("model.safetensors", "config.json"):
        assert Path("sliced", file).read_bytes() == Path("whole", file).read_bytes()


@given(st.lists(st.integers(1, LAYERS - 1), max_size=3, unique=True))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_adjoining_slices_are_one(models: Path, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), LAYERS]
    slices = [part(("a", i, j), ("b", i, j)) for i, j in pairwise(edges)]
    shared = {"merge_method": "linear", "parameters": {"weight": 0.3}}
    merge({**shared, "slices": slices}, "cut", device="cpu", overwrite=True)
    merge({**shared, "models": [{"model": "./a"}, {"model": "./b"}]}, "whole", device="cpu", overwrite=True)
    cut, whole = load_file("cut/model.safetensors"), load_file("whole/model.safetensors")
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[n], whole[n]) for n in whole)


def test_a_deeper_model_loads_and_generates(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    config = transformers.Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, max_window_layers=3)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "m")
    layers = [{"sources": [{"model": str(tmp_path / "m"), "layer_range": r}]} for r in ([0, 2], [1, 3])]
    merge({"merge_method": "passthrough", "slices": layers}, tmp_path / "out", device="cpu")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (model.config.num_hidden_layers, len(model.config.layer_types)) == (4, 4)
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape[1] > 2


def test_layers_that_a_model_does_not_have(models: Path) -> None:
    recipe = {"merge_method": "passthrough", "slices": [part(("a", 0, 2)), part(("b", 2, 9))]}
    with pytest.raises(CheckpointError, match=r"b: slices\[1\] asks for layers 2 to 8, and it has 4"):
        merge(recipe, "out", device="cpu")
    assert not Path("out").exists()


def names(*stacks: tuple[str, int]) -> list[str]:
    return ["x.weight", *(f"{p}.{i}.w.weight" for p, n in stacks for i in range(n))]


def test_the_main_stack() -> None:
    assert main_stack(names(("model.layers", 3), ("visual.blocks", 5)), None, "m").prefix == "model.layers"
    both = names(("model.layers", 3), ("mtp.layers", 1))
    assert main_stack(both, {"text_config": {"num_hidden_layers": 3}}, "m").prefix == "model.layers"
    for config, tensors, message in (
        (None, both, "several stacks"),
        ({"num_hidden_layers": 4}, names(("model.layers", 3)), "config.json says 4 layers"),
        ({"is_encoder_decoder": True}, names(("encoder.block", 3)), "encoder with a decoder"),
        (None, ["x.weight"], "no tensor's name"),
        (None, ["model.layers.0.w", "model.layers.2.w"], "no layer 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            main_stack(tensors, config, "m")


def test_what_stands_before_the_layers() -> None:
    assert all(
        map(precedes_layers, ["model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight"])
    )
    assert not any(map(precedes_layers, ["model.norm.weight", "lm_head.weight", "embed_out.weight"]))


def relay(config: dict[str, Any], picked: list[int]) -> dict[str, Any]:
    return relayered(config, "m", [(config, "m", i) for i in picked])


def test_lists_in_a_config_follow_their_layers() -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["s", "s", "f"], "mlp_only_layers": [0], "eos_token_id": [7, 8, 9]}
    assert relay(config, [0, 2, 0, 1]) == {
        "num_hidden_layers": 4,
        "layer_types": ["s", "f", "s", "s"],
        "mlp_only_layers": [0, 2],
        "eos_token_id": [7, 8, 9],
    }
    assert relay({"text_config": {"n_layer": 2}, "a": 1}, [1]) == {"text_config": {"n_layer": 1}, "a": 1}


@pytest.mark.parametrize(
    ("config", "good", "bad"),
    [
        ({"decoder_sparse_step": 2}, [0, 1, 0, 1], [0, 0]),
        ({"first_k_dense_replace": 1}, [0, 2, 1], [1, 0]),
        ({"model_type": "gemma2"}, [2, 3], [1, 2]),
        ({"use_sliding_window": True, "max_window_layers": 2}, [1, 0, 3], [2, 3]),
        ({"num_kv_shared_layers": 1}, [0, 1, 2, 3], [0, 1]),
    ],
)
def test_rules_by_number_must_still_hold(config: dict[str, Any], good: list[int], bad: list[int]) -> None:
    config = {"num_hidden_layers": 4, **config}
    assert relay(config, good)["num_hidden_layers"] == len(good)
    with pytest.raises(CheckpointError):
        relay(config, bad)
