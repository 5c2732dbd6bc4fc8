"""Parts of a model merged each in its own way, and one tensor under two names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_lr import merge, plan
from mergekit_lr.arch.modules import module_named, modules_of
from mergekit_lr.arch.naming import Aliases, nearest_names, place_in
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.recipe import load_recipe

LAYERS = 3
VISION = ["vision_tower.vision_model.encoder.layers.0.w.weight", "multi_modal_projector.linear_1.weight"]
PREFIXES = {"new": "model.language_model.", "old": "language_model.model.", "plain": "model."}
TEXT = [*(f"layers.{i}.mlp.up_proj.weight" for i in range(LAYERS)), "embed_tokens.weight", "norm.weight"]


def write(root: Path, name: str, number: int, style: str = "old", sees: bool = True) -> None:
    """A model whose every tensor holds 100 * number and its place in the list."""
    names = [f"{PREFIXES[style]}{n}" for n in TEXT]
    names.append("language_model.lm_head.weight" if style == "old" else "lm_head.weight")
    names += VISION if sees else []
    tensors = {n: torch.full((3, 2), 100.0 * number + i) for i, n in enumerate(names)}
    folder = root / name
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = {"num_hidden_layers": LAYERS, "model_type": "llama"}
    config = {"text_config": text, "vision_config": {"num_hidden_layers": 1}} if sees else text
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate("abc", 1):
        write(tmp_path, name, number)
    write(tmp_path, "text", 4, "plain", sees=False)
    write(tmp_path, "new", 5, "new")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(recipe: dict[str, Any], out: str = "out") -> dict[str, float]:
    """The one value that each output tensor holds, by what its name reads as."""
    merge(recipe, out, device="cpu", overwrite=True)
    return {"/".join(place_in(n)): t.unique().item() for n, t in load_file(f"{out}/model.safetensors").items()}


def entry(name: str, weight: float | None = None) -> dict[str, Any]:
    return {"model": f"./{name}"} | ({} if weight is None else {"parameters": {"weight": weight}})


def rules(out: str = "out") -> dict[str, str]:
    report = json.loads(Path(out, "merge_report.json").read_text())
    return {t["name"]: t["rule"] for t in report["tensors"]}


def test_each_part_in_its_own_way(models: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "modules": {
            "text_decoder": {"models": [entry("a", 1), entry("b", 3)]},
            "vision_model": {"models": [entry("c", 1)]},
            "multi_modal_projector": {"models": [entry("b"), entry("c")], "parameters": {"weight": 1}},
        },
    }
    got = run(recipe)
    assert got["text_decoder/layers.1.mlp.up_proj.weight"] == (101 + 3 * 201) / 4
    assert got["text_decoder/lm_head.weight"] == (105 + 3 * 205) / 4
    assert got["vision_tower/encoder.layers.0.w.weight"] == 306
    assert got["multi_modal_projector/linear_1.weight"] == 257
    assert json.loads(Path("out/config.json").read_text())["text_config"]["num_hidden_layers"] == LAYERS
    assert {"outside the modules"} == {
        d["rule"] for d in json.loads(Path("out/merge_report.json").read_text())["dropped"]
    }


def test_what_no_module_speaks_of_stays_as_the_base_has_it(models: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "./a",
        "modules": {"text_decoder": {"models": [entry("b", 0.5)]}},
    }
    got = run(recipe)
    assert got["text_decoder/norm.weight"] == 154
    assert (got["vision_tower/encoder.layers.0.w.weight"], got["multi_modal_projector/linear_1.weight"]) == (106, 107)
    assert {r for n, r in rules().items() if "language_model" not in n} == {
        "copied: no module of the recipe speaks of it"
    }


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_what_is_copied_gets_the_dtype_of_the_output(models: Path, method: str) -> None:
    """Also beside a method that looks at the whole model first, which must not look at what is only copied."""
    more = {"threshold_scope": "model", "density": 0.5} if method == "ties" else {}
    recipe = {
        "merge_method": method,
        "base_model": "./a",
        "modules": {"text_decoder": {"models": [entry("b", 0.5)]}},
        "parameters": more,
        "dtype": "bfloat16",
    }
    assert run(recipe)["vision_tower/encoder.layers.0.w.weight"] == 106
    assert {t.dtype for t in load_file("out/model.safetensors").values()} == {torch.bfloat16}


def test_a_model_that_sees_merged_with_one_that_does_not(models: Path) -> None:
    """In the part that both have; names, towers and config stay those of the base."""
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "base_model": "./a",
        "modules": {"text_decoder": {"models": [entry("a", 1), entry("text", 1)]}},
    }
    got = run(recipe)
    assert got["text_decoder/layers.0.mlp.up_proj.weight"] == (100 + 400) / 2
    assert got["text_decoder/lm_head.weight"] == (105 + 405) / 2
    assert got["vision_tower/encoder.layers.0.w.weight"] == 106
    assert set(load_file("out/model.safetensors")) == set(load_file("a/model.safetensors"))
    # without the modules there is no telling what is meant: one line for each part, with the way out
    whole = {"merge_method": "linear", "models": [entry("a", 1), entry("text", 1)]}
    with pytest.raises(CheckpointError, match=r"no \w+ \(1 tensor\).*modules: \{text_decoder: ") as caught:
        plan(whole)
    assert [p.partition("it has no ")[2][:6] for p in sorted(caught.value.problems)] == ["multi_", "vision"]
    # task vectors of the language model, on the language model of the other: a base of the module's own
    recipe["merge_method"] = "task_arithmetic"
    recipe["modules"]["text_decoder"] = {"base_model": "./text", "models": [entry("a", 0.5)]}
    assert run(recipe)["text_decoder/layers.0.mlp.up_proj.weight"] == 400 + 0.5 * (100 - 400)


def test_only_the_text_of_another_model_put_in(models: Path) -> None:
    text = {"base_model": None, "models": [entry("text")]}
    got = run({"merge_method": "passthrough", "base_model": "./a", "modules": {"text_decoder": text}})
    assert got["text_decoder/norm.weight"] == 404
    assert got["vision_tower/encoder.layers.0.w.weight"] == 106


@pytest.mark.parametrize("layout", ["a", "new"])
def test_renamed_modules_are_the_same_tensors(models: Path, layout: str) -> None:
    """The layout of before transformers renamed its modules and that of after: written as the first has it."""
    other = "new" if layout == "a" else "a"
    got = run({"merge_method": "linear", "models": [entry(layout, 1), entry(other, 1)]})
    assert got["text_decoder/layers.2.mlp.up_proj.weight"] == (102 + 502) / 2
    assert got["text_decoder/lm_head.weight"] == (105 + 505) / 2
    assert set(load_file("out/model.safetensors")) == set(load_file(f"{layout}/model.safetensors"))
    report = json.loads(Path("out/merge_report.json").read_text())
    assert not report["dropped"]


def test_slices_of_one_part(models: Path) -> None:
    """With the layers of a plain language model among them, and gradients within each slice."""
    slices = [
        {"sources": [{"model": "./a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "./text", "layer_range": [1, 3]}], "base_model": "./text"},
    ]
    got = run({"merge_method": "passthrough", "base_model": "./a", "modules": {"text_decoder": {"slices": slices}}})
    layers = [got[f"text_decoder/layers.{i}.mlp.up_proj.weight"] for i in range(4)]
    assert layers == [100, 101, 401, 402]
    assert (got["text_decoder/embed_tokens.weight"], got["text_decoder/norm.weight"]) == (103, 404)
    assert got["vision_tower/encoder.layers.0.w.weight"] == 106
    assert json.loads(Path("out/config.json").read_text())["text_config"]["num_hidden_layers"] == 4


def test_a_source_goes_before_its_slice_that_before_its_module_that_before_the_recipe(models: Path) -> None:
    def value(where: str) -> float:
        """Output of layer 0 where the weight stands in every scope from the outermost to ``where``."""
        scopes = {"recipe": 2.0, "module": 3.0, "slice": 5.0, "source": 7.0}
        given = dict(list(scopes.items())[: list(scopes).index(where) + 1])
        weight = {s: {"parameters": {"weight": v}} for s, v in given.items()}
        source = {"model": "./a", "layer_range": [0, 3], **weight.get("source", {})}
        part = {"sources": [source], **weight.get("slice", {})}
        module = {"slices": [part], **weight.get("module", {})}
        recipe = {"merge_method": "linear", "modules": {"text_decoder": module}, "parameters": {"normalize": False}}
        recipe["parameters"] |= {"weight": scopes["recipe"]}
        return run(recipe)["text_decoder/layers.0.mlp.up_proj.weight"] / 100

    assert [value(s) for s in ("recipe", "module", "slice", "source")] == [2, 3, 5, 7]


def test_one_module_over_everything_is_the_whole_model(models: Path) -> None:
    shared = {"merge_method": "linear", "parameters": {"weight": [0.2, 0.9], "normalize": False}}
    listed = [entry("text"), {"model": "./text2"}]
    write(models, "text2", 7, "plain", sees=False)
    run({**shared, "modules": {"text_decoder": {"models": listed}}}, "parted")
    run({**shared, "models": listed}, "whole")
    assert Path("parted/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()


def test_an_unknown_module_and_one_named_twice(models: Path) -> None:
    recipe: dict[str, Any] = {"merge_method": "passthrough", "modules": {"audio_tower": {"models": [entry("a")]}}}
    with pytest.raises(CheckpointError, match=r"no module 'audio_tower' in it; it has multi_modal_projector, text_dec"):
        plan(recipe)
    both = {"vision_tower": {"models": [entry("a")]}, "vision_model": {"models": [entry("a")]}}
    with pytest.raises(CheckpointError, match="same part as another module"):
        plan({"merge_method": "passthrough", "modules": both})


def test_methods_that_lay_out_their_own_output_take_no_modules() -> None:
    recipe = {"merge_method": "tall_masks", "base_model": "./a", "modules": {"x": {"models": [entry("b")]}}}
    with pytest.raises(RecipeError, match="lays out its own output"):
        load_recipe(recipe)


def test_the_canonical_form_means_the_same(models: Path) -> None:
    slices = [{"sources": [{"model": "./a", "layer_range": [0, 2]}], "parameters": {"weight": 2}}]
    module = {"slices": slices, "parameters": {"weight": {"filter": "mlp", "value": 3}}}
    vision = {"models": [entry("b", 1), entry("c", 2)], "parameters": {"normalize": False}}
    recipe = load_recipe(
        {"merge_method": "linear", "modules": {"text_decoder": module, "vision_tower": vision}, "seed": 3}
    )
    again = load_recipe(recipe.canonical())
    assert again.canonical() == recipe.canonical()
    assert run(recipe.canonical(), "one") == run(dict(recipe.canonical()), "two")


def test_a_missing_tensor_is_told_with_its_nearest(models: Path) -> None:
    tensors = load_file("text/model.safetensors")
    tensors["model.layers.1.mlp.up.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    write(models, "odd", 8, "plain", sees=False)
    save_file(tensors, "odd/model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.weight' is missing .* the nearest is 'model.layers.1.mlp.up.w"):
        plan({"merge_method": "linear", "models": [entry("text", 1), entry("odd", 1)]})


@given(st.sampled_from(sorted(PREFIXES)), st.sampled_from(sorted(PREFIXES)), st.lists(st.sampled_from(TEXT)))
def test_aliases_are_one_to_one(mine: str, theirs: str, left: list[str]) -> None:
    own = [PREFIXES[mine] + n for n in TEXT if n not in left]
    reference = [PREFIXES[theirs] + n for n in TEXT]
    names = Aliases(reference, own)
    found = {r: names.of(r) for r in reference}
    assert {r: o for r, o in found.items() if o} == {
        PREFIXES[theirs] + n: PREFIXES[mine] + n for n in TEXT if n not in left
    }
    assert all(names.back(o) == r for r, o in found.items() if o)


def test_names_that_could_be_two_tensors_are_not_matched() -> None:
    names = Aliases(["model.norm.weight"], ["language_model.model.norm.weight", "model.text_model.norm.weight"])
    assert names.of("model.norm.weight") is None


def test_names_of_before_and_after() -> None:
    """Bare and wrapped, and the layer norms of the first BERT files."""
    names = Aliases(["encoder.layer.0.LayerNorm.weight"], ["bert.encoder.layer.0.LayerNorm.gamma", "cls.bias"])
    assert names.of("encoder.layer.0.LayerNorm.weight") == "bert.encoder.layer.0.LayerNorm.gamma"
    spelt = ["model.layers.2.up.weight", "model.layers.3.up_proj.weight"]
    assert nearest_names("model.layers.3.up.weight", spelt)[0] == "model.layers.3.up_proj.weight"


def test_what_a_recipe_may_call_a_part() -> None:
    assert module_named("vision_model", ["vision_tower", "text_decoder"]) == "vision_tower"
    assert module_named("text_decoder", ["default"]) == "default"
    assert module_named("encoder", ["default"]) is None
    assert set(modules_of(["encoder.block.0.w", "decoder.block.0.w", "shared.w"], None).values()) == {
        "encoder",
        "decoder",
        "shared",
    }
