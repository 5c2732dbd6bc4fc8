"""Bundles of low-rank tasks: exactness, sizes on disk, what comes back as models and as adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lr import merge, open_bundle, plan, recover
from mergekit_lr.errors import CheckpointError, RecipeError, UsageError

from .conftest import CONFIG, DOWN, EMBED, NORM, SHAPES, Q, make_base, normal, tensors_of

Tensors = dict[str, torch.Tensor]


def recipe(base: Path, models: list[str | Path], **parameters: Any) -> dict[str, Any]:
    entries = [{"model": str(m), "name": f"task{i}"} for i, m in enumerate(models)]
    return {"merge_method": "reversible", "base_model": str(base), "models": entries, "parameters": parameters}


def pack(base: Path, models: list[str | Path], out: Path, **parameters: Any) -> dict[str, Any]:
    merge(recipe(base, models, **parameters), out, device="cpu")
    return json.loads((out / "packing.json").read_text())


def on(base: Path, adapters: list[Path]) -> list[str | Path]:
    return [f"{base}+{a}" for a in adapters]


def stored_bytes(out: Path) -> int:
    return sum(t.nbytes for p in out.glob("*.safetensors") for t in load_file(p).values())


@pytest.mark.parametrize("granularity", ["position", 5, "tensor"])
@pytest.mark.parametrize("gauge", ["svd", "aligned"])
def test_the_exact_point_gives_every_adapter_back(
    granularity: Any, gauge: str, base: Path, adapter: Any, tmp_path: Path
) -> None:
    """p = n - 1, other ranks, scales and rsLoRA: to 1e-5, as models, as state dicts and as adapters."""
    made = [adapter("a", 1), adapter("b", 2, rank=4, use_rslora=True), adapter("c", 3, rank=2, weights=(Q,))]
    summary = pack(base, on(base, made), tmp_path / "out", basis=2, granularity=granularity, gauge=gauge)
    assert summary["residual_energy"] < 1e-12 and max(summary["relative_error"].values()) < 1e-6
    old = tensors_of(base)
    with open_bundle(tmp_path / "out") as bundle:
        assert bundle.tasks == ("task0", "task1", "task2")
        for i, one in enumerate(made):
            wanted = tensors_of(f"{base}+{one}")
            found = bundle.state_dict(f"task{i}")
            assert set(found) == set(wanted)
            bundle.adapter(f"task{i}", tmp_path / f"again{i}")
            again = tensors_of(f"{base}+{tmp_path / f'again{i}'}")
            for name, tensor in wanted.items():
                size = float((tensor - old[name]).norm())
                assert float((found[name] - tensor).norm()) <= 1e-5 * size + 1e-6, name
                assert float((again[name] - tensor).norm()) <= 1e-5 * size + 1e-6, name
    assert torch.equal(bundle_state(tmp_path / "out", "task2")[DOWN], old[DOWN])  # it does not adapt that module


def bundle_state(out: Path, task: str) -> Tensors:
    with open_bundle(out) as bundle:
        return dict(bundle.state_dict(task))


@pytest.mark.parametrize("p", [0, 1, 2])
def test_bytes_are_those_of_the_formula(p: int, base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter(f"t{i}", i + 1, rank=8) for i in range(4)]
    summary = pack(base, on(base, made), tmp_path / "out", basis=p)
    n, r, positions = 4, 8, sum(map(sum, (SHAPES[Q], SHAPES[DOWN])))
    share = (p * (r + n) + r) / (r * n)
    assert stored_bytes(tmp_path / "out") == pytest.approx(share * 4 * positions * r * n)
    assert summary["storage"]["ratio_to_pairs"] == pytest.approx(share, rel=1e-5)
    assert summary["storage"]["bytes"]["total"] == stored_bytes(tmp_path / "out")


def test_fewer_directions_leave_the_energy_that_is_reported(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter(f"t{i}", i + 1) for i in range(4)]
    left = [pack(base, on(base, made), tmp_path / f"p{p}", basis=p)["residual_energy"] for p in range(4)]
    assert left[0] > left[1] > left[2] > left[3] and left[3] < 1e-12
    summary = json.loads((tmp_path / "p1" / "packing.json").read_text())
    assert summary["p_for_99_percent"] == 3
    old, found = tensors_of(base), bundle_state(tmp_path / "p1", "task1")
    wanted = tensors_of(f"{base}+{made[1]}")
    error = sum(float((found[n] - wanted[n]).square().sum()) for n in (Q, DOWN)) ** 0.5
    norm = sum(float((wanted[n] - old[n]).square().sum()) for n in (Q, DOWN)) ** 0.5
    assert summary["relative_error"]["task1"] == pytest.approx(error / norm, rel=1e-3)


def test_budgets(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter(f"t{i}", i + 1) for i in range(4)]
    exact = pack(base, on(base, made), tmp_path / "exact", max_error=0.0)
    assert exact["residual_energy"] < 1e-12
    half = pack(base, on(base, made), tmp_path / "half", max_error=0.5)
    assert 0.0 < half["residual_energy"] <= 0.25
    small = stored_bytes(tmp_path / "half") - 1
    pack(base, on(base, made), tmp_path / "small", max_bytes=small)
    assert stored_bytes(tmp_path / "small") <= small
    with pytest.raises(UsageError, match="byte budget is too small"):
        pack(base, on(base, made), tmp_path / "none", max_bytes="0.5KB")


def full(folder: Path, base: Path, seed: int, changed: tuple[str, ...] = tuple(SHAPES), size: float = 0.1) -> Path:
    tensors = tensors_of(base)
    folder.mkdir()
    for i, name in enumerate(changed):
        tensors[name] = tensors[name] + size * normal(seed * 10 + i, *tensors[name].shape)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_full_fine_tunes_are_cut_and_the_rest_is_verbatim(base: Path, tmp_path: Path) -> None:
    models = [full(tmp_path / f"m{i}", base, i + 1, (Q, DOWN, NORM, EMBED)) for i in range(2)]
    summary = pack(base, list(models), tmp_path / "out", basis=1, rank=3)
    old = tensors_of(base)
    for i, model in enumerate(models):
        recover(tmp_path / "out", f"task{i}", tmp_path / f"again{i}", device="cpu")
        wanted, found = tensors_of(model), tensors_of(tmp_path / f"again{i}")
        for name in (NORM, EMBED, "lm_head.weight"):
            assert torch.equal(found[name], wanted[name])
        for name in (Q, DOWN):
            u, s, vh = torch.linalg.svd((wanted[name] - old[name]).double(), full_matrices=False)
            expected = old[name] + (u[:, :3] * s[:3]) @ vh[:3]
            torch.testing.assert_close(found[name].double(), expected, atol=1e-5, rtol=0)
    whole = 2 * 4 * (SHAPES[NORM][0] + SHAPES[EMBED][0] * SHAPES[EMBED][1])
    assert summary["storage"]["bytes"]["own"] == whole
    assert not any("lm_head" in n for n in load_file(tmp_path / "out" / "bundle.safetensors"))
    config = json.loads((tmp_path / "again0" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    with open_bundle(tmp_path / "out") as bundle:
        bundle.adapter("task1", tmp_path / "adapter")
    found, again = tensors_of(f"{base}+{tmp_path / 'adapter'}"), tensors_of(tmp_path / "again1")
    for name in SHAPES:
        torch.testing.assert_close(found[name], again[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize("how", [{"energy": 0.8}, {"ratio": 0.5}, {"energy": 0.9, "rank": 2}])
def test_ranks_by_energy_and_ratio(how: dict[str, Any], base: Path, tmp_path: Path) -> None:
    models = [full(tmp_path / f"m{i}", base, i + 1, (Q, DOWN)) for i in range(2)]
    summary = pack(base, list(models), tmp_path / "out", max_error=0.0, **how)
    ranks = {w: m["rank"] for w, m in summary["modules"].items()}
    if "ratio" in how:
        assert ranks == {Q: 6, DOWN: 6}
    elif "rank" in how:
        assert ranks == {Q: 2, DOWN: 2}
    else:
        old, models_ = tensors_of(base), [tensors_of(m) for m in models]
        for name, rank in ranks.items():
            kept = []
            for m in models_:
                s = torch.linalg.svdvals((m[name] - old[name]).double()).square()
                kept.append(int((s.cumsum(0) < 0.8 * s.sum()).sum()) + 1)
            assert rank == max(kept)


def test_embeddings_can_be_low_rank_too(base: Path, tmp_path: Path) -> None:
    models = [full(tmp_path / f"m{i}", base, i + 1, (Q, EMBED, "lm_head.weight")) for i in range(2)]
    pack(base, list(models), tmp_path / "out", basis=1, rank=12, embeddings="low_rank")
    for i, model in enumerate(models):
        for name, tensor in tensors_of(model).items():
            torch.testing.assert_close(bundle_state(tmp_path / "out", f"task{i}")[name], tensor, atol=1e-5, rtol=0)
    assert not any(n.startswith("own/") for n in load_file(tmp_path / "out" / "bundle.safetensors"))
    with open_bundle(tmp_path / "out") as bundle:
        bundle.adapter("task0", tmp_path / "adapter")
    for name, tensor in tensors_of(f"{base}+{tmp_path / 'adapter'}").items():
        torch.testing.assert_close(tensor, tensors_of(models[0])[name], atol=1e-5, rtol=0)


def test_raw_state_dicts(tmp_path: Path) -> None:
    tensors = {"w1": normal(1, 9, 7), "b1": normal(2, 9), "steps": torch.tensor([3])}
    save_file(tensors, tmp_path / "base.safetensors")
    for i in range(2):
        own = {"w1": tensors["w1"] + normal(3 + i, 9, 7), "b1": tensors["b1"] + i, "steps": torch.tensor([4 + i])}
        save_file(own, tmp_path / f"m{i}.safetensors")
    models: list[str | Path] = [tmp_path / f"m{i}.safetensors" for i in range(2)]
    pack(tmp_path / "base.safetensors", models, tmp_path / "out", basis=1, rank=7)
    for i in range(2):
        found, wanted = bundle_state(tmp_path / "out", f"task{i}"), load_file(tmp_path / f"m{i}.safetensors")
        torch.testing.assert_close(found["w1"], wanted["w1"], atol=1e-5, rtol=0)
        assert torch.equal(found["b1"], wanted["b1"]) and torch.equal(found["steps"], wanted["steps"])
    with open_bundle(tmp_path / "out") as bundle, pytest.raises(UsageError, match="cannot be given as an adapter"):
        bundle.adapter("task0", tmp_path / "adapter")


def test_adding_one_tensor_to_base_and_tasks_changes_nothing(base: Path, tmp_path: Path) -> None:
    shift = {n: torch.round(4 * normal(70 + i, *s)) for i, (n, s) in enumerate(SHAPES.items())}
    moved = make_base(tmp_path / "moved")
    save_file({n: t + shift[n] for n, t in tensors_of(base).items()}, moved / "model.safetensors")
    models, others = [], []
    for i in range(3):
        models.append(full(tmp_path / f"m{i}", base, i + 1, (Q,)))
        others.append(full(tmp_path / f"o{i}", moved, i + 1, (Q,)))
    pack(base, list(models), tmp_path / "one", basis=1, rank=3)
    pack(moved, list(others), tmp_path / "two", basis=1, rank=3)
    for i in range(3):
        a, b = (bundle_state(tmp_path / n, f"task{i}")[Q] for n in ("one", "two"))
        torch.testing.assert_close(a - tensors_of(base)[Q], b - tensors_of(moved)[Q], atol=1e-4, rtol=0)


def test_dora_keeps_its_magnitudes(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter("a", 1, use_dora=True), adapter("b", 2)]
    pack(base, on(base, made), tmp_path / "out", basis=1)
    for i, one in enumerate(made):
        for name, tensor in tensors_of(f"{base}+{one}").items():
            torch.testing.assert_close(bundle_state(tmp_path / "out", f"task{i}")[name], tensor, atol=1e-5, rtol=1e-5)
        with open_bundle(tmp_path / "out") as bundle:
            bundle.adapter(f"task{i}", tmp_path / f"again{i}")
        for name, tensor in tensors_of(f"{base}+{tmp_path / f'again{i}'}").items():
            torch.testing.assert_close(tensor, tensors_of(f"{base}+{one}")[name], atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "again0" / "adapter_config.json").read_text())["use_dora"] is True
    assert json.loads((tmp_path / "again1" / "adapter_config.json").read_text())["use_dora"] is False


def test_what_adapters_save_whole_comes_back(base: Path, adapter: Any, tmp_path: Path) -> None:
    grown = normal(5, 33, 12)  # three new tokens
    made = [adapter("a", 1, saved={NORM: normal(6, 12), EMBED: grown, "lm_head.weight": 2 * grown}), adapter("b", 2)]
    pack(base, on(base, made), tmp_path / "out", basis=1)
    for i, one in enumerate(made):
        recover(tmp_path / "out", f"task{i}", tmp_path / f"again{i}", device="cpu")
        for name, tensor in tensors_of(f"{base}+{one}").items():
            torch.testing.assert_close(tensors_of(tmp_path / f"again{i}")[name], tensor, atol=1e-6, rtol=0)
    sizes = [json.loads((tmp_path / f"again{i}" / "config.json").read_text())["vocab_size"] for i in range(2)]
    assert sizes == [33, 30]
    with open_bundle(tmp_path / "out") as bundle:
        bundle.adapter("task0", tmp_path / "adapter")
    assert torch.equal(tensors_of(f"{base}+{tmp_path / 'adapter'}")[EMBED], grown)


def test_degenerate_tasks(base: Path, adapter: Any, tmp_path: Path) -> None:
    """Identical tasks, a task that changes nothing, one task alone."""
    a, b = adapter("a", 1), adapter("b", 2, size=0.0)
    pack(base, on(base, [a, a]), tmp_path / "same", basis=0)
    wanted = tensors_of(f"{base}+{a}")
    for task in ("task0", "task1"):
        torch.testing.assert_close(bundle_state(tmp_path / "same", task)[Q], wanted[Q], atol=1e-6, rtol=0)
    pack(base, on(base, [a, b]), tmp_path / "zero", basis=1)
    torch.testing.assert_close(bundle_state(tmp_path / "zero", "task1")[Q], tensors_of(base)[Q], atol=1e-6, rtol=0)
    pack(base, on(base, [a]), tmp_path / "one", basis=3)
    torch.testing.assert_close(bundle_state(tmp_path / "one", "task0")[Q], wanted[Q], atol=1e-6, rtol=0)
    twin = full(tmp_path / "twin", base, 9, ())
    pack(base, [twin, full(tmp_path / "other", base, 8, (Q,))], tmp_path / "unchanged", basis=1, rank=2)
    assert torch.equal(bundle_state(tmp_path / "unchanged", "task0")[Q], tensors_of(base)[Q])


def test_live_swap_and_recovered_folder_agree_to_the_bit(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter("a", 1), adapter("b", 2, use_dora=True)]
    pack(base, on(base, made), tmp_path / "out", basis=1)

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = torch.nn.ParameterDict({n.replace(".", "/"): torch.zeros(s) for n, s in SHAPES.items()})

        def state_dict(self, *_: Any, **__: Any) -> Any:
            return {n.replace("/", "."): p for n, p in self.kept.items()}

    module = Holder()
    with open_bundle(tmp_path / "out") as bundle:
        for task in ("task0", "task1", "task0"):
            bundle.load_into(module, task)
            recover(tmp_path / "out", task, tmp_path / "again", device="cpu", overwrite=True)
            for name, tensor in tensors_of(tmp_path / "again").items():
                assert torch.equal(module.state_dict()[name], tensor), name


def test_half_precision_bundles_lose_a_rounding(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = [adapter("a", 1), adapter("b", 2)]
    given = recipe(base, on(base, made), basis=1)
    merge({**given, "dtype": "bfloat16"}, tmp_path / "out", device="cpu")
    summary = json.loads((tmp_path / "out" / "packing.json").read_text())
    assert 1e-4 < max(summary["relative_error"].values()) < 1e-2
    assert summary["storage"]["bytes"]["total"] * 2 == plan(given).layout.total_bytes


def test_bad_input(base: Path, adapter: Any, tmp_path: Path) -> None:
    made = on(base, [adapter("a", 1), adapter("b", 2)])
    tried = 0

    def refused(match: str, kind: type[Exception], models: list[str | Path], **parameters: Any) -> None:
        nonlocal tried
        tried += 1
        out = tmp_path / f"out{tried}"
        with pytest.raises(kind, match=match):
            merge(recipe(base, models, **parameters), out, device="cpu")
        assert not out.exists()

    refused("one of basis, max_bytes and max_error", RecipeError, made)
    refused("one of basis, max_bytes and max_error", RecipeError, made, basis=1, max_error=0.1)
    refused("energy or ratio", RecipeError, made, basis=1, energy=0.5, ratio=0.5)
    refused("no rank is given", RecipeError, [*made, full(tmp_path / "m", base, 1)], basis=1)
    revisions = on(base, [adapter("r1", 4, revision="one"), adapter("r2", 5, revision="two")])
    refused("different revisions", CheckpointError, revisions, basis=1)
    merge(recipe(base, revisions, basis=1, different_bases=True), tmp_path / "allowed", device="cpu")
    other = make_base(tmp_path / "bf16", torch.bfloat16)
    refused("its base is not", CheckpointError, [made[0], f"{other}+{tmp_path / 'b'}"], basis=1)
    spoilt = on(base, [adapter("nan", 6, size=float("nan"))])
    refused("NaN or infinit", CheckpointError, spoilt, basis=0)
    merge(recipe(base, made, basis=1), tmp_path / "out", device="cpu")
    with open_bundle(tmp_path / "out", base=other) as bundle, pytest.raises(CheckpointError, match="not the base"):
        bundle.state_dict("task0")[Q]
    with open_bundle(tmp_path / "out") as bundle, pytest.raises(UsageError, match="did you mean task"):
        bundle.adapter("tusk0", tmp_path / "no")


def test_plan_says_what_it_cannot_know(base: Path, adapter: Any, tmp_path: Path) -> None:
    models: list[str | Path] = [full(tmp_path / "m", base, 1), *on(base, [adapter("a", 1)])]
    found = plan(recipe(base, models, basis=1, rank=2))
    assert any("found out by the merge" in w for w in found.warnings)
    exact = plan(recipe(base, on(base, [tmp_path / "a"]), basis=0))
    merge(recipe(base, on(base, [tmp_path / "a"]), basis=0), tmp_path / "out", device="cpu")
    assert exact.layout.total_bytes == stored_bytes(tmp_path / "out")
