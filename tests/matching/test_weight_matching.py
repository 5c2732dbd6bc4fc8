"""The method through the whole engine: planted copies, saved permutations, several models, other methods after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import FAMILIES, llama
from safetensors.torch import load_file, save_file

from mergekit_lr import barrier, merge, plan
from mergekit_lr.arch.spec import spec_for
from mergekit_lr.errors import CheckpointError, LinalgError, RecipeError, UsageError
from mergekit_lr.matching.barrier import barrier_height
from mergekit_lr.matching.member import apply_all, random_member
from mergekit_lr.pieces import apply
from mergekit_lr.registry import get_method

SHAPES = {"fc1.weight": (9, 6), "fc1.bias": (9,), "fc2.weight": (8, 9), "fc2.bias": (8,), "fc3.weight": (3, 8)}
SPEC = spec_for("auto", SHAPES, None, "mlp")
Tensors = dict[str, torch.Tensor]
THROUGH = ("bert", "gpt2", "llama", "qwen3", "qwen3_moe", "t5", "vit")
MORE_THROUGH = (
    *("bert_classifier", "llama_untied", "mistral", "mixtral", "qwen2", "qwen2_moe", "roberta", "roberta_words"),
    "t5_relu",
)
"""Every family of transformers that there is a spec for."""


def weights(seed: int) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}


def write(path: Path, tensors: Tensors) -> str:
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path)
    return str(path)


def recipe(*models: str, **more: Any) -> dict[str, Any]:
    return {"merge_method": "weight_matching", "models": [{"model": m} for m in models], "permutations": "auto", **more}


def run(out: Path, *models: str, **more: Any) -> tuple[Tensors, dict[str, Any]]:
    report = merge(recipe(*models, **more), out, device="cpu", threads=1).report
    return load_file(out / "model.safetensors"), report


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str, Tensors]:
    a = weights(0)
    moved = apply_all(SPEC, random_member(SPEC, 1), a)
    return write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", moved), a


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_a_permuted_copy_merges_back_to_the_original_bit_for_bit(pair, tmp_path, t) -> None:
    a, b, tensors = pair
    found, report = run(tmp_path / "out", a, b, parameters={"t": t})
    assert all(torch.equal(found[n], x) for n, x in tensors.items())
    [row] = report["details"]["models"]
    assert row["agreement_after"] == pytest.approx(1.0)
    assert row["objective_after"] == pytest.approx(row["objective_at_most"])
    assert report["rules"] == {"merged": 5}


def test_interpolation_is_a_line_from_the_first_model_to_the_aligned_second(tmp_path) -> None:
    a, b = write(tmp_path / "a.safetensors", weights(0)), write(tmp_path / "b.safetensors", weights(1))
    ends = [run(tmp_path / f"t{t}", a, b, parameters={"t": t})[0] for t in (0.0, 1.0)]
    middle, _ = run(tmp_path / "middle", a, b, parameters={"t": 0.25})
    assert all(torch.equal(ends[0][n], x) for n, x in weights(0).items())
    assert all(torch.allclose(middle[n], 0.75 * ends[0][n] + 0.25 * ends[1][n], atol=1e-6) for n in middle)
    for n, x in weights(1).items():  # the same numbers, elsewhere
        assert torch.equal(ends[1][n].flatten().sort().values, x.flatten().sort().values)


def test_saved_permutations_are_used_again(pair, tmp_path) -> None:
    a, b, tensors = pair
    run(tmp_path / "first", a, b)
    saved = tmp_path / "first" / "weight_matching" / "permutations.safetensors"
    found, _ = run(tmp_path / "again", a, b, permutations=str(saved))
    assert all(torch.equal(found[n], x) for n, x in tensors.items())
    with pytest.raises(CheckpointError, match="for 2 models"):
        run(tmp_path / "three", a, b, write(tmp_path / "c.safetensors", weights(2)), permutations=str(saved))
    with pytest.raises(CheckpointError, match="holds no permutations"):
        run(tmp_path / "no", a, b, permutations=a)


def test_three_models_are_averaged_where_they_meet(pair, tmp_path) -> None:
    a, b, tensors = pair
    c = write(tmp_path / "c.safetensors", apply_all(SPEC, random_member(SPEC, 2), tensors))
    found, _ = run(tmp_path / "out", a, b, c)
    assert all(torch.equal(found[n], x) for n, x in tensors.items())
    with pytest.raises(RecipeError, match="t is for two models"):
        run(tmp_path / "t", a, b, c, parameters={"t": 0.3})


def test_another_method_may_follow(pair, tmp_path) -> None:
    a, b, tensors = pair
    other = apply_all(SPEC, random_member(SPEC, 4), {n: x + 1.0 for n, x in tensors.items()})
    c = write(tmp_path / "c.safetensors", other)
    models = [{"model": b, "parameters": {"weight": 0.5}}, {"model": c, "parameters": {"weight": 0.25}}]
    said = recipe(b, c, base_model=a, parameters={"then": "task_arithmetic"}) | {"models": models}
    merge(said, tmp_path / "out", device="cpu")
    found = load_file(tmp_path / "out" / "model.safetensors")
    # b is the base once aligned, and c is the base plus one everywhere
    assert all(torch.allclose(found[n], x + 0.25, atol=1e-6) for n, x in tensors.items())


def test_every_parameter_of_the_method_that_follows_reaches_it(tmp_path) -> None:
    """By filter and by model too; against the same method on tensors that were aligned here."""
    base = weights(0)
    g = torch.Generator().manual_seed(1)
    near = [{n: x + 0.1 * torch.randn(x.shape, generator=g) for n, x in base.items()} for _ in range(2)]
    files = [
        write(tmp_path / f"{i}.safetensors", apply_all(SPEC, random_member(SPEC, 5 + i), t)) for i, t in enumerate(near)
    ]
    density = [{"filter": "fc2", "value": 0.3}, {"value": 0.7}]
    said = recipe(*files, base_model=write(tmp_path / "base.safetensors", base))
    said["models"][0]["parameters"] = {"weight": 0.6, "density": density}
    said["models"][1]["parameters"] = {"weight": 0.5, "density": 0.4}
    said["parameters"] = {"then": "dare_ties", "lambda": 0.8, "normalize": True, "rescale_by": "l1", "rescale": False}
    merge(said, tmp_path / "out", device="cpu")
    found = load_file(tmp_path / "out" / "model.safetensors")
    keys = [str(m["model"]) for m in said["models"]]
    given = {k: v for k, v in said["parameters"].items() if k != "then"}
    for n, x in base.items():
        models = [{"weight": 0.6, "density": 0.3 if "fc2" in n else 0.7}, {"weight": 0.5, "density": 0.4}]
        tensors = [t[n] for t in near]
        want = apply(get_method("dare_ties"), tensors, x, merge=given, models=models, name=n, keys=keys)
        assert torch.equal(found[n], want)
        plain = apply(get_method("dare_ties"), tensors, x, models=models, name=n, keys=keys)
        assert not torch.equal(want, plain)


def test_a_method_may_follow_on_some_tensors_only(pair, tmp_path) -> None:
    a, _, tensors = pair
    b = write(tmp_path / "c.safetensors", {n: 3 * x for n, x in tensors.items()})
    then = [{"filter": "fc1", "value": "linear"}]
    found, _ = run(tmp_path / "out", a, b, parameters={"then": then, "weight": [0.5], "normalize": False, "t": 0})
    for n, x in tensors.items():
        assert torch.allclose(found[n], 2 * x if "fc1" in n else x, atol=1e-6)


def test_a_gradient_runs_over_the_layers(tmp_path) -> None:
    example = llama(num_hidden_layers=3)
    a = {n: t.float() for n, t in example.tensors.items()}
    b = {n: t + 0.01 for n, t in a.items()}
    paths = folder(tmp_path / "a", example.config, a), folder(tmp_path / "b", example.config, b)
    found, _ = run(tmp_path / "out", *paths, parameters={"t": [0.0, 0.5, 1.0], "only": "kv.*"})
    for n, x in found.items():
        layer = int(n.split(".")[2]) if "layers" in n else 0
        assert torch.allclose(x, a[n] + 0.005 * layer, atol=1e-6), n


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"then": "nope"}, "then"),
        ({"then": "weight_matching"}, "lays out its own output"),
        ({"normalize": True}, "normalize"),
        ({"then": "slerp", "normalize": True}, "normalize"),
        ({"then": "linear", "weight": 1, "normalize": "often"}, "normalize"),
        ({"then": "linear"}, "weight"),
        ({"then": "ties", "weight": 1}, "needs a base_model"),
        ({"then": "ties", "weight": 1, "threshold_scope": "model"}, "statistics of the whole model"),
        ({"then": "fisher", "curvature": "c.safetensors"}, "does not fit after it"),
        ({"then": [{"filter": "fc1", "value": "linear"}, {"value": "nope"}], "weight": 1}, "then"),
        ({"restarts": [{"filter": "fc1", "value": 2}, {"value": 3}]}, "cannot differ between tensors"),
        ({"data": "x.safetensors"}, "set cost"),
    ],
)
def test_parameters_that_make_no_sense_are_errors(pair, tmp_path, parameters, words) -> None:
    with pytest.raises(RecipeError, match=words):
        run(tmp_path / "out", *pair[:2], parameters=parameters)


def test_a_fine_tune_stays_as_it_is_and_a_warning_says_so(pair, tmp_path) -> None:
    a, _, tensors = pair
    g = torch.Generator().manual_seed(0)
    tuned = {n: x + 0.02 * torch.randn(x.shape, generator=g) for n, x in tensors.items()}
    found, report = run(tmp_path / "out", a, write(tmp_path / "c.safetensors", tuned), parameters={"t": 1.0})
    assert all(torch.equal(found[n], x) for n, x in tuned.items())
    assert any("nothing was permuted" in w for w in report["warnings"])


def test_bad_models_are_errors_that_name_the_tensor(pair, tmp_path) -> None:
    a, _, tensors = pair
    wider = tensors | {"fc1.weight": torch.zeros(10, 6), "fc1.bias": torch.zeros(10), "fc2.weight": torch.zeros(8, 10)}
    with pytest.raises(CheckpointError, match=r"fc1.bias.*optimal transport"):
        run(tmp_path / "o1", a, write(tmp_path / "w.safetensors", wider))
    with pytest.raises(CheckpointError, match="only one of it"):
        run(
            tmp_path / "o2", a, write(tmp_path / "d.safetensors", {n: x for n, x in tensors.items() if n != "fc2.bias"})
        )
    with pytest.raises(CheckpointError, match="I8 and cannot be matched"):
        run(tmp_path / "o3", a, write(tmp_path / "q.safetensors", tensors | {"fc2.weight": torch.ones(8, 9).char()}))
    broken = {n: x.clone() for n, x in tensors.items()}
    broken["fc2.weight"][0, 0] = float("nan")
    with pytest.raises(LinalgError, match="not finite"):
        run(tmp_path / "o4", a, write(tmp_path / "n.safetensors", broken))
    with pytest.raises(RecipeError, match="nothing to align"):
        run(tmp_path / "o5", a)


def test_a_plan_reads_no_weights_and_says_what_it_does_not_know(pair) -> None:
    found = plan(recipe(*pair[:2]))
    assert any("not known before the merge" in w for w in found.to_dict()["warnings"])


def test_threads_and_memory_do_not_change_a_bit(tmp_path) -> None:
    a, b = write(tmp_path / "a.safetensors", weights(0)), write(tmp_path / "b.safetensors", weights(1))
    said = recipe(a, b, parameters={"seed": 3, "restarts": 2})
    files = []
    for i, more in enumerate(({"threads": 1}, {"threads": 2}, {"threads": 2, "max_memory": "2MiB"})):
        merge(said, tmp_path / f"o{i}", device="cpu", **more)
        saved = tmp_path / f"o{i}" / "weight_matching" / "permutations.safetensors"
        files.append(((tmp_path / f"o{i}" / "model.safetensors").read_bytes(), saved.read_bytes()))
    assert files[0] == files[1] == files[2]


def test_activations_on_data_find_the_permutation(pair, tmp_path) -> None:
    a, b, tensors = pair
    data = write(tmp_path / "data.safetensors", {"inputs": torch.randn(80, 6)})
    found, _ = run(tmp_path / "out", a, b, parameters={"cost": "both", "data": data, "t": 1.0})
    assert all(torch.equal(found[n], x) for n, x in tensors.items())
    with pytest.raises(RecipeError, match="nothing to run the models on"):
        run(tmp_path / "no", a, b, parameters={"cost": "activations"})


def folder(path: Path, config: dict[str, Any], tensors: Tensors, vocabulary: dict[str, int] | None = None) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    if vocabulary is not None:
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return str(path)


@pytest.mark.parametrize("name", [*THROUGH, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_THROUGH)])
def test_a_bf16_model_keeps_its_function_through_the_engine(name, tmp_path) -> None:
    """t = 1 writes B, permuted to lie near A: another model on disk, the same logits in transformers."""
    example = FAMILIES[name]()
    assert example.loaded is not None
    half = {n: t.to(torch.bfloat16) for n, t in example.tensors.items()}
    config = {k: v for k, v in example.config.items() if k != "dtype"} | {"torch_dtype": "bfloat16"}
    g = torch.Generator().manual_seed(8)
    first = {n: torch.randn(t.shape, generator=g).bfloat16() for n, t in half.items()}
    a, b = folder(tmp_path / "a", config, first), folder(tmp_path / "b", config, half)
    out, report = run(tmp_path / "out", a, b, parameters={"t": 1.0})
    moved = report["details"]["models"][0]["moved"]
    assert len(moved) >= 5
    want, got = (example.loaded(t, torch.float32) for t in (half, out))
    assert all(t.dtype == torch.bfloat16 for t in out.values())
    assert (want - got).abs().max() <= 1e-3
    changed = [n for n in out if half[n].ndim > 1 and not torch.equal(out[n], half[n])]
    for left_out in (changed[0], max(changed, key=lambda n: half[n].numel()), changed[-1]):
        broken = {**out, left_out: half[left_out]}
        assert (want - example.loaded(broken, torch.float32)).abs().max() > 1e-2, left_out


def test_tokens_are_matched_by_their_string(tmp_path) -> None:
    """B numbers its tokens otherwise and lacks one: its rows are put in A's order, the missing one is A's own."""
    example = llama(tie_word_embeddings=False)
    tensors = {n: t.float() for n, t in example.tensors.items()}
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    other = dict(tensors)
    for n in ("model.embed_tokens.weight", "lm_head.weight"):
        other[n] = tensors[n][order]
    names = [f"t{i}" for i in range(11)]
    lacking = int(order[0])
    vocabulary = {names[int(j)]: i for i, j in enumerate(order) if int(j) != lacking} | {"another": 0}
    a = folder(tmp_path / "a", example.config, tensors, {t: i for i, t in enumerate(names)})
    b = folder(tmp_path / "b", example.config, other, vocabulary)
    found, _ = run(tmp_path / "out", a, b, parameters={"t": 1.0, "only": "ffn.*"})
    assert all(torch.equal(found[n], x) for n, x in tensors.items())


def test_the_barrier_of_a_permuted_copy_vanishes(pair, tmp_path) -> None:
    a, b, tensors = pair
    inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    hidden = (inputs @ tensors["fc1.weight"].T + tensors["fc1.bias"]).relu()
    hidden = (hidden @ tensors["fc2.weight"].T + tensors["fc2.bias"]).relu()
    labels = (hidden @ tensors["fc3.weight"].T).argmax(1)
    data = write(tmp_path / "data.safetensors", {"inputs": inputs, "labels": labels})
    result = barrier(recipe(a, b), data=data, points=3)
    assert result["barrier_matched"] == pytest.approx(0.0, abs=1e-6)
    assert result["barrier_naive"] > 0.1
    assert len(set(result["matched"])) == 1
    with pytest.raises(UsageError, match="one of the two"):
        barrier(recipe(a, b))
    with pytest.raises(RecipeError, match="no line to measure on"):
        barrier(recipe(a, b, write(tmp_path / "c.safetensors", tensors)), data=data)


def test_a_barrier_is_the_height_above_the_chord() -> None:
    assert barrier_height([1.0, 3.0, 2.0]) == pytest.approx(1.5)
    assert barrier_height([1.0, 1.0, 2.0]) == 0.0
