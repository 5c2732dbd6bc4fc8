"""What users reported of recipes, errors and dtypes at mergekit (issue numbers of its tracker), each a test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lr import load_recipe, merge, plan
from mergekit_lr.errors import CheckpointError, RecipeError

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.1.mlp.up_proj.weight": (12, 8),
    "model.norm.weight": (8,),
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``./a`` and ``./b`` of two layers, ``./deep`` of three, in bfloat16."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "b", "deep")):
        shapes = SHAPES | ({"model.layers.2.mlp.up_proj.weight": (12, 8)} if name == "deep" else {})
        generator = torch.Generator().manual_seed(i)
        tensors = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
        config = {"model_type": "llama", "num_hidden_layers": 3 if name == "deep" else 2, "torch_dtype": "bfloat16"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


LINEAR = "merge_method: linear\nmodels:\n  - {model: ./a, parameters: {weight: 0.5}}\n  - {model: ./%s}\n%s"


def linear(other: str = "b, parameters: {weight: 0.5}", more: str = "") -> str:
    return LINEAR % (other, more)


def test_527_a_misspelt_method_is_found_before_anything_is_opened() -> None:
    """There, after a download of twenty minutes. The models named here do not even exist."""
    with pytest.raises(RecipeError, match="did you mean 'linear'") as caught:
        load_recipe(linear().replace("linear", "linaer"))
    assert caught.value.problems[0].startswith("recipe:1:15: merge_method")


def test_527_models_of_different_depth_are_refused_from_headers(models: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan(linear("a, parameters: {weight: 0.5}").replace("model: ./a", "model: ./deep", 1), device="cpu")
    assert "model.layers.2.mlp.up_proj.weight" in str(caught.value)


def test_479_a_seed_under_parameters_is_refused_with_its_place() -> None:
    with pytest.raises(RecipeError, match="random_seed is a key of the recipe itself"):
        load_recipe(linear(more="parameters: {random_seed: 3}\n"))
    assert load_recipe(linear(more="random_seed: 3\n")).seed == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (linear("b, parameters: {wieght: 0.5}"), "did you mean 'weight'?"),
        (linear(more="parameters: {normalize: maybe}\n"), "'maybe' is not true or false"),
        (linear(more="slices: []\n"), "cannot stand beside models"),
        ("merge_method: ties\nmodels: [{model: ./a, parameters: {weight: 1}}]\n", "base_model: is missing"),
        ("merge_method: slerp\nbase_model: ./a\nmodels: [{model: ./b}]\n", "t is missing, and slerp needs it"),
        (linear(more="dtpye: float16\n"), "did you mean 'dtype'?"),
    ],
)
def test_418_402_mistakes_are_one_line_with_place_and_remedy(text: str, said: str) -> None:
    """There, tracebacks of pydantic, or nothing."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(text)
    [line] = [p for p in caught.value.problems if said in p]
    assert line.startswith("recipe:")
    assert "\n" not in line
    assert "pydantic" not in line


@pytest.mark.parametrize(("dtype", "meant"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_604_316_the_output_has_the_dtype_that_was_asked_for(models: Path, dtype: str, meant: torch.dtype) -> None:
    merge(linear(more=f"dtype: {dtype}\n"), "out", device="cpu")
    assert {t.dtype for t in load_file("out/model.safetensors").values()} == {meant}
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == dtype


def test_204_out_dtype_alone_decides_what_is_written(models: Path) -> None:
    merge(linear(more="dtype: float32\nout_dtype: float16\n"), "out", device="cpu")
    assert {t.dtype for t in load_file("out/model.safetensors").values()} == {torch.float16}
    with pytest.raises(RecipeError, match="dtype is a key of the recipe itself"):
        load_recipe(linear(more="parameters: {dtype: float16}\n"))


def test_562_every_tensor_is_written_whole(models: Path) -> None:
    """There, one release wrote a quarter of each."""
    merge(linear(), "out", device="cpu")
    out = load_file("out/model.safetensors")
    assert {n: tuple(t.shape) for n, t in out.items()} == SHAPES
    a, b = load_file("a/model.safetensors"), load_file("b/model.safetensors")
    for name, tensor in out.items():
        assert torch.equal(tensor, ((a[name].float() + b[name].float()) / 2).bfloat16())


def test_649_a_method_may_look_at_all_tensors_at_once(models: Path) -> None:
    """There, a method sees one tensor. Here, a threshold over the whole model keeps as many entries as asked for."""
    recipe = {
        "merge_method": "ties",
        "base_model": "./a",
        "models": [{"model": "./b", "parameters": {"weight": 1, "density": 0.25}}],
        "parameters": {"threshold_scope": "model"},
        "dtype": "float32",
    }
    merge(recipe, "out", device="cpu")
    a, out = load_file("a/model.safetensors"), load_file("out/model.safetensors")
    changed = sum(int((out[n] != a[n].float()).sum()) for n in a)
    total = sum(t.numel() for t in a.values())
    assert changed == int(0.25 * total)


def test_192_a_damaged_input_is_named(models: Path) -> None:
    path = models / "b" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"b/model\.safetensors"):
        plan(linear(), device="cpu")


def test_671_gibberish_from_nan_is_refused_with_the_tensor(models: Path) -> None:
    from mergekit_lr.errors import NonFiniteError

    path = models / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        merge(linear(), "out", device="cpu")
    assert not Path("out").exists()
