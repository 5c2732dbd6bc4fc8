"""A merge from end to end: values, bytes, accounting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lr import merge, plan
from mergekit_lr.engine import memory
from mergekit_lr.errors import CheckpointError, NonFiniteError, UsageError


def linear(*models: Path, weights: tuple[float, ...] = (0.3, 0.7), **extra: Any) -> dict[str, Any]:
    entries = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)]
    return {"merge_method": "linear", "models": entries, **extra}


def task(base: Path, *models: Path, **extra: Any) -> dict[str, Any]:
    entries = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]
    return {"merge_method": "task_arithmetic", "base_model": str(base), "models": entries, **extra}


def ties(base: Path, *models: Path, **extra: Any) -> dict[str, Any]:
    entries = [{"model": str(m), "parameters": {"weight": 0.5, "density": 0.4}} for m in models]
    return {"merge_method": "ties", "base_model": str(base), "models": entries, **extra}


def ties_model_wide(base: Path, *models: Path, **extra: Any) -> dict[str, Any]:
    return ties(base, *models, parameters={"threshold_scope": "model"}, **extra)


def dare(base: Path, *models: Path) -> dict[str, Any]:
    return {**ties(base, *models), "merge_method": "dare_linear", "seed": 3}


@pytest.fixture
def three(make, random_tensors) -> list[Path]:
    return [make(f"m{i}", random_tensors(i), shards=1 + i) for i in range(3)]


def test_linear_is_the_weighted_mean_rounded_once(three, tmp_path, load):
    merge(linear(*three[:2]), tmp_path / "out", device="cpu")
    a, b, got = load(three[0]), load(three[1]), load(tmp_path / "out")
    assert got.keys() == a.keys()
    for name in a:
        exact = 0.3 * a[name].double() + 0.7 * b[name].double()
        # fp32 arithmetic, one rounding: half a bf16 ulp, and a little for fp32
        assert ((got[name].double() - exact).abs() <= exact.abs() * 2**-8 + 1e-8).all()


def test_task_arithmetic_adds_weighted_deltas_to_the_base(three, tmp_path, load):
    merge(task(*three, dtype="float32"), tmp_path / "out", device="cpu")
    base, a, b = (load(m) for m in three)
    got = load(tmp_path / "out")
    for name in base:
        w = base[name].double()
        exact = w + 0.5 * (a[name].double() - w) + 0.5 * (b[name].double() - w)
        assert got[name].dtype is torch.float32
        torch.testing.assert_close(got[name].double(), exact, rtol=1e-6, atol=1e-8)


def test_a_model_wide_threshold_competes_over_all_tensors(three, tmp_path, load):
    merge(ties_model_wide(*three, dtype="float32"), tmp_path / "out", device="cpu")
    base, *tuned = (load(m) for m in three)
    names = sorted(base, key=list(base).index)
    trimmed = []
    for model in tuned:
        delta = torch.cat([(model[n].double() - base[n].double()).reshape(-1) for n in names])
        keep = delta.abs().sort(descending=True).values[int(0.4 * delta.numel()) - 1]
        trimmed.append(torch.where(delta.abs() >= keep, delta, 0.0) * 0.5)
    sign = torch.sign(trimmed[0] + trimmed[1])
    agree = [(torch.sign(d) == sign) & (d != 0) for d in trimmed]
    share = sum(a * 0.5 for a in agree)
    exact = sum(d * a for d, a in zip(trimmed, agree, strict=True)) / torch.clamp(share, min=0.5)
    got = load(tmp_path / "out")
    flat = torch.cat([(got[n].double() - base[n].double()).reshape(-1) for n in names])
    # Only entries that tie at the threshold may differ from this reference, which keeps all of them.
    assert ((flat - exact).abs() > 1e-6).sum() <= 0.001 * flat.numel()


SEVERAL = {"task_arithmetic": task, "ties": ties, "model-wide": ties_model_wide, "dare": dare}


@pytest.mark.parametrize("recipe", SEVERAL.values(), ids=SEVERAL)
def test_bytes_depend_on_nothing_but_recipe_and_inputs(recipe, make, random_tensors, tmp_path, monkeypatch, load):
    shapes = {"model.layers.0.w.weight": (700, 300), "model.layers.1.w.weight": (131_072,), "x.weight": (513, 129)}
    models = [make(f"m{i}", random_tensors(i, shapes=shapes)) for i in range(3)]
    variants: list[dict[str, Any]] = [
        {"threads": 1},
        {"threads": 2},
        {"threads": 8},
        {"shard_size": 200_000},
        {"shard_size": 100_000_000},
        {"max_memory": "8MiB"},
    ]
    reference = None
    for i, options in enumerate(variants):
        for piece in (1 << 18, 1 << 16, 1 << 30):
            monkeypatch.setattr(memory, "PIECE", piece)
            out = tmp_path / f"out-{i}-{piece}"
            merge(recipe(*models), out, device="cpu", **options)
            digests = {t["name"]: t["digest"] for t in json.loads((out / "merge_report.json").read_text())["tensors"]}
            tensors = {n: t.view(torch.uint8).numpy().tobytes() for n, t in load(out).items()}
            reference = reference or (digests, tensors)
            assert (digests, tensors) == reference


def test_sharded_output_has_an_index_that_places_every_tensor(three, tmp_path, load):
    merge(linear(*three[:2]), tmp_path / "out", device="cpu", shard_size=20_000)
    out = tmp_path / "out"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    from safetensors import safe_open

    for file in files:
        with safe_open(out / file, "pt") as f:
            assert {n for n, s in index["weight_map"].items() if s == file} == set(f.keys())
    total = sum(t.numel() * t.element_size() for t in load(out).values())
    assert index["metadata"]["total_size"] == total


def test_every_tensor_is_accounted_for(make, random_tensors, tmp_path, load):
    base, other = random_tensors(0), random_tensors(1)
    base |= {"model.layers.0.position_ids": torch.arange(10), "model.flag": torch.tensor([True, False])}
    other |= {"model.layers.0.position_ids": torch.arange(10) + 5, "model.flag": torch.tensor([True, True])}
    other["extra.weight"] = torch.zeros(3)
    result = merge(task(make("base", base), make("other", other)), tmp_path / "out", device="cpu")
    got = load(tmp_path / "out")
    assert torch.equal(got["model.layers.0.position_ids"], torch.arange(10))  # copied, never averaged
    assert torch.equal(got["model.flag"], base["model.flag"])
    assert result.report["rules"]["copied: I64 is not averaged"] == 1
    assert result.report["rules"]["copied: BOOL is not averaged"] == 1
    assert [d["tensor"] for d in result.report["dropped"]] == ["extra.weight"]
    assert any("extra.weight" in w for w in result.report["warnings"])
    assert sum(result.report["rules"].values()) == len(got) + 1


def test_tied_head_is_written_as_the_base_has_it(make, random_tensors, tmp_path, load):
    tied = {k: v for k, v in random_tensors(0).items() if k != "lm_head.weight"}
    config = {"model_type": "llama", "tie_word_embeddings": True}
    a = make("a", tied, config=config)
    b = make("b", {k: v for k, v in random_tensors(1).items() if k != "lm_head.weight"}, config=config)
    merge(task(a, b), tmp_path / "tied", device="cpu")
    assert "lm_head.weight" not in load(tmp_path / "tied")
    full = make("full", random_tensors(2))
    merge(task(full, a), tmp_path / "untied", device="cpu")  # a's head is its embeddings
    got = load(tmp_path / "untied")["lm_head.weight"].double()
    base = random_tensors(2)["lm_head.weight"].double()
    exact = base + 0.5 * (tied["model.embed_tokens.weight"].double() - base)
    assert ((got - exact).abs() <= exact.abs() * 2**-8 + 1e-8).all()


TIED = {"model_type": "llama", "tie_word_embeddings": True}


def test_a_head_of_its_own_is_refused_where_the_base_ties_it(make, random_tensors, tmp_path):
    tied = {k: v for k, v in random_tensors(0).items() if k != "lm_head.weight"}
    base, other = make("base", tied, config=TIED), make("other", random_tensors(1))
    with pytest.raises(CheckpointError, match=r"other: 'lm_head.weight' differs.*base_model"):
        merge(task(base, other), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    merge(task(other, base), tmp_path / "advised", device="cpu")  # what the message says to do


def test_a_stored_head_that_is_the_embeddings_is_dropped_by_a_rule(make, random_tensors, tmp_path, load):
    tied = {k: v for k, v in random_tensors(0).items() if k != "lm_head.weight"}
    both = random_tensors(1)
    both["lm_head.weight"] = both["model.embed_tokens.weight"].clone()
    base, other = make("base", tied, config=TIED), make("other", both, config=TIED)
    result = merge(task(base, other), tmp_path / "out", device="cpu")
    assert "lm_head.weight" not in load(tmp_path / "out")
    [dropped] = result.report["dropped"]
    assert (dropped["tensor"], dropped["rule"]) == ("lm_head.weight", f"tied to the embeddings in {base}")
    both["lm_head.weight"][95, 63] += 1  # the last element alone
    odd = make("odd", both, config=TIED)
    with pytest.raises(CheckpointError, match="differs from the model's embeddings"):
        merge(task(base, odd), tmp_path / "lost", device="cpu")


def test_missing_tensors_and_shapes_are_reported_all_at_once(make, random_tensors, tmp_path):
    base = random_tensors(0)
    other = random_tensors(1)
    del other["model.norm.weight"]
    other["model.embed_tokens.weight"] = torch.zeros(97, 64, dtype=torch.bfloat16)
    other["lm_head.weight"] = torch.zeros(97, 64, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError) as e:
        merge(task(make("base", base), make("other", other)), tmp_path / "out", device="cpu")
    assert len(e.value.problems) == 3
    assert any("model.norm.weight" in p and "missing" in p for p in e.value.problems)
    assert any("[97, 64]" in p and "[96, 64]" in p for p in e.value.problems)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_values_that_are_not_finite_are_refused_with_their_place(make, random_tensors, tmp_path, bad, method):
    a, b, c = (random_tensors(i) for i in range(3))
    b["model.layers.1.mlp.up_proj.weight"].view(-1)[12345] = bad
    base, other, third = make("a", a), make("b", b), make("c", c)
    recipe = {
        "linear": linear(base, other),
        "ties": ties(base, third, other),
        "slerp": {
            "merge_method": "slerp",
            "base_model": str(base),
            "models": [{"model": str(other)}],
            "parameters": {"t": 0.5},
        },
    }[method]
    with pytest.raises(NonFiniteError, match=r"b: tensor 'model.layers.1.mlp.up_proj.weight' holds 1 values.*12345"):
        merge(recipe, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_overflow_in_the_last_cast_is_an_error(make, tmp_path):
    a = make("a", {"w.weight": torch.full((10,), 65000.0)})
    b = make("b", {"w.weight": torch.full((10,), 66100.0)})
    with pytest.raises(NonFiniteError, match=r"65550.*F16 becomes infinite from 65520"):
        merge(linear(a, b, weights=(0.5, 0.5), out_dtype="float16"), tmp_path / "out", device="cpu")
    merge(linear(a, b, weights=(0.6, 0.4), out_dtype="float16"), tmp_path / "out2", device="cpu")


def test_quantised_checkpoints_are_refused(make, random_tensors, tmp_path):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}
    a, b = make("a", random_tensors(0), config=config), make("b", random_tensors(1))
    with pytest.raises(CheckpointError, match="quantised"):
        merge(linear(a, b), tmp_path / "out", device="cpu")


def test_the_plan_reads_no_weights_and_matches_what_is_written(three, tmp_path, monkeypatch):
    from mergekit_lr.checkpoint.model import Checkpoint

    with monkeypatch.context() as m:
        m.setattr(Checkpoint, "read", lambda *a, **k: pytest.fail("a weight was read"))
        laid_out = plan(ties(*three), device="cpu", shard_size=30_000)
    merge(ties(*three), tmp_path / "out", device="cpu", shard_size=30_000)
    written = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert {s["file"]: s["bytes"] for s in laid_out.to_dict()["shards"]} == written


def test_output_is_refused_where_it_would_hurt(three, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="one of the inputs"):
        merge(linear(*three[:2]), three[0], device="cpu", overwrite=True)
    with pytest.raises(UsageError, match="one of the inputs"):
        merge(linear(*three[:2]), tmp_path / "m1" / ".." / "m0", device="cpu", overwrite=True)
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        merge(linear(*three[:2]), out, device="cpu")
    assert (out / "mine.txt").read_text() == "precious"
    merge(linear(*three[:2]), out, device="cpu", overwrite=True)
    assert not (out / "mine.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m0", "m1", "m2", "out"]


def test_inputs_that_change_during_the_run_are_noticed(three, tmp_path, monkeypatch):
    from mergekit_lr.engine import run

    original = run.drain

    def touching(*args: Any) -> None:
        original(*args)
        path = three[0] / "model.safetensors"
        path.write_bytes(path.read_bytes())

    monkeypatch.setattr(run, "drain", touching)
    with pytest.raises(CheckpointError, match="changed during the run"):
        merge(linear(*three[:2]), tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_file_modes_follow_the_umask(three, tmp_path):
    import os

    before = os.umask(0o027)
    try:
        merge(linear(*three[:2]), tmp_path / "out", device="cpu")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
