"""TALL masks and two values through the engine: packed, recovered, killed, spoilt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lr import inspect, merge, open_bundle, recover, verify
from mergekit_lr.bundle.masks import masked_sum, pack, spread, unpack
from mergekit_lr.bundle.packing import task_names
from mergekit_lr.bundle.two_values import nearer_high, two_means
from mergekit_lr.errors import CheckpointError, NonFiniteError, RecipeError, UsageError
from mergekit_lr.recipe import load_recipe

from ..killing import killed_everywhere
from .conftest import Maker

SHAPES = {"a.weight": (150, 500), "b.weight": (3, 5), "norm.weight": (7,)}


def draw(count: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[dict[str, Tensor]]:
    """A base and ``count`` models around it."""
    g = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=g) for n, s in SHAPES.items()}
    models = [{n: w + 0.1 * torch.randn(w.shape, generator=g) for n, w in base.items()} for _ in range(count)]
    # multiples of 1/256: differences and sums are exact in fp32, so the formula has one answer
    return [{n: (w.mul(256).round() / 256).to(dtype) for n, w in m.items()} for m in (base, *models)]


def recipe(paths: list[str], method: str = "tall_masks", **parameters: Any) -> dict[str, Any]:
    models = [{"model": p, "name": f"t{i}"} for i, p in enumerate(paths[1:])]
    return {"merge_method": method, "base_model": paths[0], "models": models, "parameters": parameters}


def expected(models: list[dict[str, Tensor]], task: int, lam: float) -> dict[str, Tensor]:
    """The formula in numpy float64, with tau rounded to the models' dtype as it is stored."""
    out = {}
    for n, base in models[0].items():
        d = [(m[n].double() - base.double()) for m in models[1:]]
        tau = sum(d[1:], d[0]).float().to(base.dtype).double()
        mask = d[task].abs() > lam * (tau - d[task]).abs()
        out[n] = (base.double() + mask * tau).float().to(base.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("memory", [None, "12MiB"])
def test_tasks_come_out_as_the_formula_says(write: Maker, tmp_path: Path, dtype: torch.dtype, memory: Any) -> None:
    models = draw(3, dtype)
    merge(recipe(write(models), **{"lambda": 0.5}), tmp_path / "bundle", device="cpu", max_memory=memory)
    with open_bundle(tmp_path / "bundle") as bundle:
        assert bundle.tasks == ("t0", "t1", "t2")
        for t, task in enumerate(bundle.tasks):
            want = expected(models, t, 0.5)
            state = bundle.state_dict(task)
            out = tmp_path / task
            recover(tmp_path / "bundle", task, out, device="cpu", threads=1 + t % 2)
            found = load_file(out / "model.safetensors")
            assert set(found) == set(want) == set(state)
            for n, w in want.items():
                assert torch.equal(found[n], w), n
                assert torch.equal(state[n], found[n])


def test_a_bundle_takes_what_the_formula_says_and_explains_itself(write: Maker, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(600, 800, generator=g).bfloat16()} for _ in range(9)]
    paths = write(models)
    result = merge(recipe(paths), tmp_path / "bundle", device="cpu")
    ours = sum(p.stat().st_size for p in (tmp_path / "bundle").glob("*.safetensors"))
    packed = sum(Path(p).stat().st_size for p in paths[1:])
    assert ours / packed == pytest.approx((2 + 8 / 16) / 8, rel=0.02)
    storage = result.report["details"]["storage"]
    assert storage["bits"] == {"base": 7_680_000, "vector": 7_680_000, "mask": 3_840_000, "total": 19_200_000}
    assert storage["ratio"] == (2 + 8 / 16) / 8
    assert verify(tmp_path / "bundle").problems == []
    assert verify(tmp_path / "bundle").digests_checked == 10
    found = inspect(tmp_path / "bundle")
    assert found.to_dict()["tasks"] == [f"t{i}" for i in range(8)]
    assert any("19,200,000 bits" in line for line in found.summary_lines())
    assert not (tmp_path / "bundle" / "config.json").exists()


def test_the_papers_sizes_are_gigabits() -> None:
    """20 ViT-B/32 in fp32: T P' + F trained and frozen parameters, two of 32 bits and T of one."""
    trained, frozen = 87_849_216, 25_599_489
    for tasks, before, after in ((8, 23.3, 7.1), (14, 40.2, 7.7), (20, 57.0, 8.2)):
        assert round(32 * (tasks * trained + frozen) / 1e9, 1) == before
        assert round((64 * trained + tasks * trained + 32 * frozen) / 1e9, 1) == after


def test_packing_is_little_endian_and_knows_its_length() -> None:
    """Known defect of the authors' code: it unpacks without a count, and takes padding for elements."""
    bits = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    packed = pack(bits)
    assert packed.tolist() == [0b00001101, 0b00000110]
    assert torch.equal(unpack(packed, 11), bits)
    assert spread(packed, 11, torch.bfloat16, 0.5).tolist() == (bits.float() * 0.5).tolist()


@given(st.integers(1, 40), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(0, 9999))
@settings(deadline=None, max_examples=40)
def test_masked_sum_is_one_rounding_of_the_formula(n: int, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    base, tau = torch.randn(n, generator=g).to(dtype), (0.1 * torch.randn(n, generator=g)).to(dtype)
    mask = torch.rand(n, generator=g) > 0.5
    for factor in (1.0, 0.8203125):
        want = (base.float() + (factor * tau.float()) * mask).to(dtype)
        assert torch.equal(masked_sum(base, tau, pack(mask), factor), want)
        out = torch.empty_like(base)
        masked_sum(base, tau, pack(mask), factor, out=out)
        assert torch.equal(out, want)


@pytest.mark.parametrize("method", ["tall_masks", pytest.param("two_values", marks=pytest.mark.slow)])
def test_killed_at_every_operation_while_packing(write: Maker, tmp_path: Path, method: str) -> None:
    paths = write([{"a.weight": m["a.weight"][:5].contiguous()} for m in draw(2)])
    action = f"""
from mergekit_lr import merge
def act(out):
    merge({recipe(paths, method)!r}, out, device="cpu", threads=1)
"""
    assert killed_everywhere(action, tmp_path / "work") > 20


def test_killed_at_every_operation_while_recovering(write: Maker, tmp_path: Path) -> None:
    paths = write([{"a.weight": m["a.weight"][:5].contiguous()} for m in draw(2)])
    merge(recipe(paths), tmp_path / "bundle", device="cpu", shard_size=5_000)
    action = f"""
from mergekit_lr import recover
def act(out):
    recover({str(tmp_path / "bundle")!r}, "t1", out, device="cpu", threads=1)
"""
    assert killed_everywhere(action, tmp_path / "work") > 15


def test_the_mask_that_auto_takes_is_best_and_a_fitted_factor_is_better(write: Maker, tmp_path: Path) -> None:
    models = draw(3)
    paths = write(models)

    def error(**parameters: Any) -> float:
        out = tmp_path / f"b{len(list(tmp_path.glob('b*')))}"
        merge(recipe(paths, **parameters), out, device="cpu")
        with open_bundle(out) as bundle:
            state = bundle.state_dict("t1")
            return sum(float((state[n].double() - models[2][n].double()).square().sum()) for n in SHAPES)

    auto = error(**{"lambda": "auto"})
    assert all(auto <= error(**{"lambda": lam}) for lam in (0.2, 0.6, 1.5))
    assert error(**{"lambda": "auto", "factor": "fitted"}) < error(**{"lambda": 0.4, "factor": "fitted"}) < auto


def test_a_fitted_factor_is_the_least_squares_one(write: Maker, tmp_path: Path) -> None:
    models = draw(2, torch.float32)
    result = merge(recipe(write(models), **{"lambda": 0.4, "factor": "fitted"}), tmp_path / "b", device="cpu")
    d = [(m["a.weight"].double() - models[0]["a.weight"].double()).flatten().numpy() for m in models[1:]]
    tau = d[0] + d[1]
    for task in range(2):
        chosen = tau * (np.abs(d[task]) > 0.4 * np.abs(tau - d[task]))
        best = float(chosen @ d[task] / (chosen @ chosen))
        assert result.report["notes"]["a.weight"]["factor"][task] == pytest.approx(best, rel=2**-8)


def test_two_tasks_and_one_come_out_exactly_as_they_were(write: Maker, tmp_path: Path) -> None:
    for count in (1, 2):
        models = draw(count)
        merge(recipe(write(models), "two_values"), tmp_path / f"b{count}", device="cpu")
        with open_bundle(tmp_path / f"b{count}") as bundle:
            for t, task in enumerate(bundle.tasks):
                state = bundle.state_dict(task)
                assert all(torch.equal(state[n], w) for n, w in models[t + 1].items())
        assert verify(tmp_path / f"b{count}").problems == []


@given(st.lists(st.integers(-200, 200), min_size=1, max_size=6))
@settings(deadline=None)
def test_two_means_are_the_best_of_all_groupings(values: list[int]) -> None:
    w = torch.tensor(values, dtype=torch.float32)[:, None] / 64
    low, high = two_means(w)
    found = sum(float(torch.where(nearer_high(x, low, high), high, low) - x) ** 2 for x in w)
    x = np.array(values) / 64
    best = min(
        sum(float(((x[side] - x[side].mean()) ** 2).sum()) for side in (picked, ~picked) if side.any())
        for number in range(2 ** len(x))
        for picked in [np.array([number >> i & 1 for i in range(len(x))], dtype=bool)]
    )
    assert found == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("parameters", [{}, {"multi_task": "ties"}, {"lambda": "auto", "factor": "fitted"}])
def test_degenerate_tasks(write: Maker, tmp_path: Path, parameters: dict[str, Any]) -> None:
    base, one = draw(1)
    # a task that is the base; two that are equal
    merge(recipe(write([base, base, one, one]), **parameters), tmp_path / "bundle", device="cpu")
    with open_bundle(tmp_path / "bundle") as bundle:
        assert all(torch.equal(bundle.state_dict("t0")[n], w) for n, w in base.items())
        assert all(torch.equal(bundle.state_dict("t1")[n], bundle.state_dict("t2")[n]) for n in base)
    merge(recipe(write([base, one]), **({} if "factor" in parameters else parameters)), tmp_path / "o", device="cpu")
    if parameters.get("multi_task") != "ties":
        with open_bundle(tmp_path / "o") as bundle:
            for n, w in one.items():
                tau = (w.float() - base[n].float()).bfloat16().float()
                assert torch.equal(bundle.state_dict("t0")[n], (base[n].float() + tau).bfloat16())


def test_what_only_a_task_has_is_kept_verbatim(write: Maker, tmp_path: Path) -> None:
    base, one, two = draw(2)
    one["head.weight"] = torch.randn(4, 4).bfloat16()
    two["b.weight"] = torch.randn(4, 5).bfloat16()
    for m in (base, one, two):
        m["ids"] = torch.arange(3)
    two["ids"] = torch.arange(3) + 1
    del two["norm.weight"]
    result = merge(recipe(write([base, one, two])), tmp_path / "bundle", device="cpu")
    assert result.report["details"]["storage"]["bytes"]["own"] == 2 * 16 + 2 * 20 + 2 * 24
    with open_bundle(tmp_path / "bundle") as bundle:
        first, second = bundle.state_dict("t0"), bundle.state_dict("t1")
        assert set(first) == set(one)
        assert set(second) == set(two)
        assert torch.equal(first["head.weight"], one["head.weight"])
        assert torch.equal(second["b.weight"], two["b.weight"])
        assert torch.equal(second["ids"], two["ids"])


def test_bad_input(write: Maker, tmp_path: Path) -> None:
    models = draw(2)
    paths = write(models)
    merge(recipe(paths), tmp_path / "bundle", device="cpu")
    with pytest.raises(UsageError, match=r"no task 't9'.*did you mean"):
        recover(tmp_path / "bundle", "t9", tmp_path / "out")
    linear = {"merge_method": "linear", "models": [{"model": str(tmp_path / "bundle"), "parameters": {"weight": 1}}]}
    with pytest.raises(CheckpointError, match=r"a bundle, not a model.*mergekit-lr recover"):
        merge(linear, tmp_path / "out")
    shard = tmp_path / "bundle" / "bundle.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"not as it was written.*digest"):
        for task in ("t0", "t1"):
            recover(tmp_path / "bundle", task, tmp_path / f"out-{task}")
    assert any("not as it was written" in p for p in verify(tmp_path / "bundle").problems)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"no safetensors|no weights|missing"):
        recover(tmp_path / "bundle", "t0", tmp_path / "out")
    models[1]["a.weight"][1, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"a\.weight"):
        merge(recipe(write(models)), tmp_path / "other", device="cpu")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "other").exists()


def test_names_of_tasks() -> None:
    def names(*models: dict[str, str]) -> list[str]:
        loaded = load_recipe({"merge_method": "tall_masks", "base_model": "b", "models": list(models)})
        return task_names(loaded.groups[0].inputs)

    assert names({"model": "org/a b"}, {"model": "x/c.safetensors"}, {"model": "d", "name": "e"}) == ["a-b", "c", "e"]
    assert names({"model": "base+lora/german"}) == ["german"]
    with pytest.raises(RecipeError, match=r"two models would be called 'ft'.*name"):
        names({"model": "one/ft"}, {"model": "two/ft"})


def test_recovered_folders_load_and_predict_as_the_swapped_model(tmp_path: Path) -> None:
    from mergekit_lr.evaluation import load_for_evaluation

    models = Path(__file__).parents[2] / "examples" / "models"
    entries = [{"model": str(models / t), "name": t} for t in ("python", "german")]
    packing = {"merge_method": "tall_masks", "base_model": str(models / "base"), "models": entries}
    merge(packing, tmp_path / "bundle", device="cpu")
    recover(tmp_path / "bundle", "german", tmp_path / "german", device="cpu")
    recover(tmp_path / "bundle", "german", tmp_path / "again", device="cpu", threads=1, max_memory="64MiB")
    one, other = ((tmp_path / d / "model.safetensors").read_bytes() for d in ("german", "again"))
    assert one == other
    assert verify(tmp_path / "german").problems == []
    loaded, tokenizer = load_for_evaluation(tmp_path / "german")
    swapped, _ = load_for_evaluation(models / "base")
    with open_bundle(tmp_path / "bundle") as bundle:
        bundle.load_into(swapped, "python")
        bundle.load_into(swapped, "german")
    ids = torch.tensor([tokenizer("Guten Morgen, Welt")["input_ids"]])
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, swapped(ids).logits)
    assert json.loads((tmp_path / "german" / "config.json").read_text())["model_type"] == "llama"


def test_lambda_by_held_out_loss_is_the_best_of_the_grid(tmp_path: Path) -> None:
    from mergekit_lr import plan
    from mergekit_lr.evaluation import batch_loss, load_for_evaluation

    examples = Path(__file__).parents[2] / "examples"
    text = (examples / "text" / "heldout" / "german.txt").read_text(encoding="utf-8")
    (tmp_path / "german.txt").write_text(text[:6000], encoding="utf-8")
    entries = [{"model": str(examples / "models" / t), "name": t} for t in ("c", "german")]
    entries[0]["parameters"] = {"lambda": 0.3}  # type: ignore[assignment]
    packing: dict[str, Any] = {
        "merge_method": "tall_masks",
        "base_model": str(examples / "models" / "base"),
        "models": entries,
        "parameters": {"lambda": "grid"},
        "calibration": {"text": [str(tmp_path / "german.txt")], "samples": 4, "sequence_length": 64},
    }
    assert any("lambda of german is chosen" in w for w in plan(packing, device="cpu").warnings)
    result = merge(packing, tmp_path / "bundle", device="cpu")
    found = result.report["details"]["lambda"]
    assert set(found) == {"german"}
    losses = found["german"]["losses"]
    assert found["german"]["lambda"] == float(min(losses, key=losses.get))
    # The loss that decided is that of the model which the bundle gives back.
    network, tokenizer = load_for_evaluation(examples / "models" / "base")
    ids = tokenizer(text[:6000], add_special_tokens=False, verbose=False)["input_ids"]
    every = [torch.tensor(ids[i : i + 65]) for i in range(0, len(ids) - 65, 64)]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    with open_bundle(tmp_path / "bundle") as bundle:
        bundle.load_into(network, "german")
    loss = batch_loss(network, torch.stack([every[i] for i in sorted(order[:4])])) / (4 * 64)
    assert loss == pytest.approx(min(losses.values()), rel=1e-6)
    assert not (tmp_path / "bundle.partial").exists()
    with pytest.raises(RecipeError, match="calibration is not used"):
        merge({**packing, "parameters": {"lambda": 0.4}}, tmp_path / "other", device="cpu")
    with pytest.raises(RecipeError, match="needs text files"):
        merge({k: v for k, v in packing.items() if k != "calibration"}, tmp_path / "third", device="cpu")
