"""A recipe of several stages gives the bytes that its stages give one after another, written to disk in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lr import merge, plan, verify
from mergekit_lr.errors import CheckpointError, NonFiniteError, ResourceError, UsageError

from ..killing import killed_everywhere
from .conftest import SHAPES

LARGE = {"model.layers.0.mlp.up_proj.weight": (1_201, 113), "model.norm.weight": (65_537,), "odd": (3, 5, 7)}


@pytest.fixture
def models(make, random_tensors) -> dict[str, str]:
    """Four models of the common layout, by name."""
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "num_hidden_layers": 2}
    return {name: str(make(name, random_tensors(i), config)) for i, name in enumerate("wxyz")}


def recipe_of(method: str, base: str | None, names: list[str], **more: Any) -> dict[str, Any]:
    parameters = {"weight": 0.5} if method not in ("slerp", "model_stock", "passthrough", "nearswap") else {}
    if method in ("ties", "dare_ties", "breadcrumbs"):
        parameters["density"] = 0.4
    found: dict[str, Any] = {"merge_method": method, "models": [{"model": n, "parameters": parameters} for n in names]}
    return found | ({"base_model": base} if base else {}) | more


STAGES = {
    "linear": lambda m: recipe_of("linear", None, [m["x"], m["y"]], dtype="bfloat16"),
    "linear in float32": lambda m: recipe_of("linear", None, [m["x"], m["y"]], dtype="float32"),
    "task_arithmetic": lambda m: recipe_of("task_arithmetic", m["w"], [m["x"], m["y"]]),
    "dare_ties": lambda m: recipe_of("dare_ties", m["w"], [m["x"], m["y"]], seed=3),
    "slerp": lambda m: recipe_of("slerp", m["x"], [m["y"]], parameters={"t": [0.2, 0.9]}),
    "ties": lambda m: recipe_of("ties", m["w"], [m["x"], m["y"]], dtype="float16"),
    "ties of the model": lambda m: recipe_of("ties", m["w"], [m["x"], m["y"]], parameters={"threshold_scope": "model"}),
    "rows": lambda m: recipe_of("model_stock", m["w"], [m["x"], m["y"]], parameters={"filter_wise": True}),
    "stacked layers": lambda m: {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": m["x"], "layer_range": [0, 2]}]},
            {"sources": [{"model": m["y"], "layer_range": [0, 2]}]},
        ],
    },
}
ENDS = {
    "linear": lambda m: recipe_of("linear", None, ["stage", m["z"]], dtype="bfloat16"),
    "slerp": lambda m: recipe_of("slerp", "stage", [m["z"]], parameters={"t": 0.3}),
    "ties": lambda m: recipe_of("ties", m["w"], ["stage", m["z"]], dtype="float32"),
}
STREAMED = {
    ("linear", "linear"): True,
    ("dare_ties", "linear"): True,
    ("dare_ties", "ties"): True,
    ("slerp", "linear"): True,
    ("slerp", "slerp"): False,
    ("ties", "linear"): True,
    ("ties", "ties"): False,
    ("ties of the model", "linear"): False,
    ("rows", "linear"): False,
}


def tensors_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "merge_report.json").read_bytes())["tensors"]
    return found


def both_ways(stage: dict[str, Any], end: dict[str, Any], tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Run in one go and with the detour; the results must be equal. Returns the report of the first."""
    merge(stage, tmp_path / "stage", device="cpu", threads=1)
    by_hand = json.loads(json.dumps(end).replace('"stage"', json.dumps(str(tmp_path / "stage"))))
    # A model's name is part of the key of its random masks; these methods at the end have none.
    merge(by_hand, tmp_path / "detour", device="cpu", threads=1)
    result = merge(end | {"stages": {"stage": stage}}, tmp_path / "at once", device="cpu", **more)
    assert tensors_of(tmp_path / "at once") == tensors_of(tmp_path / "detour")
    same = ["config.json", "model.safetensors"]
    for name in same:
        assert (tmp_path / "at once" / name).read_bytes() == (tmp_path / "detour" / name).read_bytes()
    assert not (tmp_path / "at once.partial").exists()
    return result.report


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_bytes_as_with_a_detour(stage, end, models, tmp_path):
    if stage == "stacked layers":
        models |= {"w": _stacked(models["w"], tmp_path / "w4"), "z": _stacked(models["z"], tmp_path / "z4")}
    report = both_ways(STAGES[stage](models), ENDS[end](models), tmp_path, threads=2)
    [told] = report["stages"]
    assert told["name"] == "stage"
    if (stage, end) in STREAMED:
        assert told["how"] == ("streamed" if STREAMED[stage, end] else "written first")


def _stacked(model: str, out: Path) -> str:
    """The model with its layers twice, so that it fits a stacked stage."""
    sources = [{"sources": [{"model": model, "layer_range": [0, 2]}]}] * 2
    merge({"merge_method": "passthrough", "slices": sources}, out, device="cpu")
    return str(out)


@pytest.mark.parametrize("method", ["task_arithmetic", "slerp"])
@pytest.mark.parametrize("end", ["linear", "ties", "rows"])
def test_large_tensors_in_any_pieces(method, end, make, random_tensors, tmp_path):
    made = {n: str(make(n, random_tensors(i, torch.float32, LARGE))) for i, n in enumerate("wxyz")}
    ends = ENDS | {
        "rows": lambda m: recipe_of("model_stock", m["w"], ["stage", m["z"]], parameters={"filter_wise": True})
    }
    both_ways(STAGES[method](made), ends[end](made), tmp_path, threads=2, max_memory="40MiB")


def test_three_stages_in_a_row_and_one_used_twice(models, tmp_path, load):
    a = recipe_of("linear", None, [models["x"], models["y"]], dtype="float32")
    b = recipe_of("slerp", "a", [models["z"]], parameters={"t": 0.5}, dtype="float32")
    end = recipe_of("linear", None, ["a", "b"], dtype="float32")
    report = merge(end | {"stages": {"b": b, "a": a}}, tmp_path / "out", device="cpu").report
    assert [s["name"] for s in report["stages"]] == ["a", "b"]
    x, y, z, out = (load(Path(p)) for p in (models["x"], models["y"], models["z"], tmp_path / "out"))
    for name in SHAPES:
        first = (x[name].double() + y[name].double()) / 2
        cos = float((first * z[name]).sum() / (first.norm() * z[name].double().norm()))
        angle = torch.acos(torch.tensor(cos, dtype=torch.float64))
        second = torch.sin(angle / 2) / torch.sin(angle) * (first + z[name].double())
        assert torch.allclose(out[name].double(), (first + second) / 2, rtol=0, atol=1e-7)
    verify(tmp_path / "out")


def test_the_plan_shows_the_stages(models):
    stages = {"stage": STAGES["ties"](models)}
    shown = plan(ENDS["ties"](models) | {"stages": stages}, device="cpu")
    [told] = shown.to_dict()["stages"]
    assert (told["name"], told["merge_method"], told["how"]) == ("stage", "ties", "written first")
    assert any(line.startswith("stage stage: ties of ") for line in shown.summary_lines())


def test_memory_of_stages_counts(models):
    end = ENDS["linear"](models)
    alone = plan(recipe_of("linear", None, [models["x"], models["z"]]), device="cpu", threads=1)
    staged = plan(end | {"stages": {"stage": STAGES["dare_ties"](models)}}, device="cpu", threads=1)
    assert staged.budget.peak > alone.budget.peak * 1.5
    with pytest.raises(ResourceError, match="max-memory"):
        plan(end | {"stages": {"stage": STAGES["dare_ties"](models)}}, device="cpu", threads=1, max_memory="4MiB")


def test_a_fault_in_an_input_of_a_stage_is_named(models, make, random_tensors, tmp_path):
    spoilt = random_tensors(9)
    spoilt["model.norm.weight"][3] = float("nan")
    bad = str(make("bad", spoilt))
    stage = recipe_of("linear", None, [models["x"], bad])
    end = ENDS["linear"](models)
    with pytest.raises(NonFiniteError, match="bad"):
        merge(end | {"stages": {"stage": stage}}, tmp_path / "out", device="cpu")
    lenient = {"stages": {"stage": stage | {"nonfinite": "warn"}}, "nonfinite": "warn"}
    report = merge(end | lenient, tmp_path / "warned", device="cpu").report
    assert [w for w in report["warnings"] if "bad: tensor 'model.norm.weight' holds 1 values" in w]


def test_a_stage_that_does_not_fit_is_refused(models, make, random_tensors, tmp_path):
    other = str(make("other", random_tensors(5, shapes=SHAPES | {"model.norm.weight": (65,)})))
    with pytest.raises(CheckpointError, match=r"stage: tensor 'model.norm.weight' has shape \[64\]|other: tensor"):
        merge(
            recipe_of("linear", None, ["stage", other]) | {"stages": {"stage": STAGES["linear"](models)}},
            tmp_path / "out",
            device="cpu",
        )


def test_the_output_must_not_be_an_input_of_a_stage(models):
    with pytest.raises(UsageError, match="one of the inputs"):
        merge(
            ENDS["linear"](models) | {"stages": {"stage": STAGES["linear"](models)}},
            models["x"],
            device="cpu",
            overwrite=True,
        )


def test_an_adapter_on_a_stage(models, tmp_path, load):
    shape = SHAPES["model.layers.0.mlp.up_proj.weight"]
    lora = tmp_path / "lora"
    lora.mkdir()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator)
    prefix = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    end = {"merge_method": "passthrough", "models": [{"model": f"stage+{lora}"}], "dtype": "float32"}
    merge(end | {"stages": {"stage": STAGES["linear"](models)}}, tmp_path / "out", device="cpu")
    merge(STAGES["linear"](models), tmp_path / "plain", device="cpu")
    out, plain = load(tmp_path / "out"), load(tmp_path / "plain")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(out[name], plain[name].float() + 2 * b @ a, atol=1e-6)
    assert torch.equal(out["lm_head.weight"], plain["lm_head.weight"].float())


def test_the_card_names_the_models_and_the_stages(models, tmp_path):
    end = ENDS["linear"](models) | {"stages": {"stage": STAGES["slerp"](models)}}
    merge(end, tmp_path / "out", device="cpu")
    card = (tmp_path / "out" / "README.md").read_text()
    head = card.split("---")[1]
    assert [line for line in head.splitlines() if line.startswith("- ")][:3] == ["- z", "- x", "- y"]
    assert "made in the same run: stage (`slerp`)" in card


ACTION = """
from mergekit_lr import merge

def act(out):
    merge({recipe!r}, out, device="cpu", threads=1, shard_size=25_000)
"""


def test_killed_at_every_operation_and_resumed(make, random_tensors, tmp_path):
    shapes = {"b.weight": (100, 64), "c.weight": (300,)}
    w, x, y, z = (str(make(n, random_tensors(i, shapes=shapes))) for i, n in enumerate("wxyz"))
    written = recipe_of("ties", w, [x, y])
    streamed = recipe_of("linear", None, ["written", z])
    end = recipe_of("ties", w, ["streamed", z]) | {"stages": {"streamed": streamed, "written": written}}
    action = ACTION.format(recipe=end)
    assert killed_everywhere(action, tmp_path / "work") > 20


def test_a_written_stage_is_not_made_twice_and_an_edited_one_is(models, tmp_path, monkeypatch):
    from mergekit_lr.engine import run

    stage, end = STAGES["ties"](models), ENDS["ties"](models)
    monkeypatch.setattr(run, "small_files", _once_then_fail(run.small_files))
    with pytest.raises(KeyboardInterrupt):
        merge(end | {"stages": {"stage": stage}}, tmp_path / "out", device="cpu")
    kept = tmp_path / "out.partial" / "stages" / "stage" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.setattr(run, "small_files", _once_then_fail(run.small_files, after=0))
    with pytest.raises(KeyboardInterrupt):  # the stage is there, so that this is the end's turn already
        merge(end | {"stages": {"stage": stage}}, tmp_path / "out", device="cpu")
    assert kept.stat().st_mtime_ns == before
    monkeypatch.undo()
    edited = stage | {"parameters": {"lambda": 0.5}}
    with pytest.raises(UsageError, match="was for another run"):
        merge(end | {"stages": {"stage": edited}}, tmp_path / "out", device="cpu")
    merge(end | {"stages": {"stage": edited}}, tmp_path / "out", device="cpu", resume=False)
    merge(end | {"stages": {"stage": edited}}, tmp_path / "afresh", device="cpu")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "afresh")


def _once_then_fail(original: Any, after: int = 1) -> Any:
    calls: list[int] = []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return original(*arguments)

    return failing
