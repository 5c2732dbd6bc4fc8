"""Quantised offsets: the stream of bits, the levels and scales of groups, and bundles of them through the engine."""

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
from torch import Tensor, nn

from mergekit_lr import inspect, merge, open_bundle, recover, verify
from mergekit_lr.bundle.bits import levels_of, pack_codes, stream_bytes, unpack_codes
from mergekit_lr.bundle.quantized import Quantizing, quantize, spans
from mergekit_lr.errors import CheckpointError, NonFiniteError, RecipeError
from mergekit_lr.method import GRID

from .conftest import Maker

SHAPES = {"a.weight": (150, 500), "b.weight": (3, 5), "c.weight": (9, 2, 50), "norm.weight": (70,)}


def draw(count: int, dtype: torch.dtype = torch.bfloat16, shapes: dict[str, Any] = SHAPES) -> list[dict[str, Tensor]]:
    """A base and ``count`` models around it."""
    g = torch.Generator().manual_seed(5)
    base = {n: torch.randn(s, generator=g) for n, s in shapes.items()}
    models = [{n: w + 0.1 * torch.randn(w.shape, generator=g) for n, w in base.items()} for _ in range(count)]
    return [{n: w.to(dtype) for n, w in m.items()} for m in (base, *models)]


def recipe(paths: list[str], **parameters: Any) -> dict[str, Any]:
    models = [{"model": p, "name": f"t{i}"} for i, p in enumerate(paths[1:])]
    return {"merge_method": "quantized", "base_model": paths[0], "models": models, "parameters": parameters}


def every_level(bits: int) -> np.ndarray[Any, Any]:
    """Every level of a scale of one, as the documentation says."""
    codes = np.arange(2**bits, dtype=np.float64)
    return codes - (2 ** (bits - 1) if bits > 2 else (2**bits - 1) / 2)


@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 9999))
@settings(deadline=None)
def test_a_stream_is_little_endian_and_without_waste(bits: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, n)
    whole = sum(int(c) << bits * i for i, c in enumerate(codes))  # one long number
    packed = pack_codes(torch.from_numpy(codes.astype(np.uint8)), bits)
    assert bytes(packed.tolist()) == whole.to_bytes(-(-n * bits // 8), "little")
    assert packed.numel() == stream_bytes(n, bits)
    assert unpack_codes(packed, n, bits).tolist() == codes.tolist()
    zero = 2.0 ** (bits - 1) if bits > 2 else (2**bits - 1) / 2
    assert levels_of(packed, n, bits, zero).tolist() == (codes - zero).tolist()


@given(st.integers(1, 8), st.sampled_from([8, 13, 64]), st.integers(1, 100), st.booleans(), st.integers(0, 9999))
@settings(deadline=None, max_examples=60)
def test_every_entry_gets_the_nearest_level(bits: int, group: int, columns: int, squares: bool, seed: int) -> None:
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize(x, bits, group, squares)
    width = min(group, columns)
    assert scales.shape == (3, -(-columns // width))
    levels, step = every_level(bits), scales.double().numpy().repeat(width, axis=1)[:, :columns]
    values = x.double().numpy()
    error = np.abs(levels[codes.numpy()] * step - values)
    nearest = np.abs(levels[:, None, None] * step - values).min(axis=0)
    assert error == pytest.approx(nearest, abs=1e-6)
    inside = (values / step >= levels[0] - 0.5) & (values / step <= levels[-1] + 0.5)
    assert (error[inside] <= np.abs(step[inside]) / 2 * (1 + 1e-6)).all()
    if squares or bits == 1:
        return
    assert (error <= np.abs(step) / 2 * (1 + 1e-6)).all()
    # with a scale that is smaller by two units of bf16 an entry is off by more than half a step, whatever its sign
    smaller = step * (1 - 2**-6)
    for sign in (1, -1):
        off = np.abs(levels[:, None, None] * smaller * sign - values).min(axis=0) > np.abs(smaller) / 2
        assert all(off[:, k : k + width].any(axis=1).all() for k in range(0, columns, width))


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 9999))
@settings(deadline=None, max_examples=60)
def test_what_lies_on_a_grid_is_exact(bits: int, columns: int, seed: int) -> None:
    """Levels of one scale, both ends among them; and the grid that leaves the odd level out."""
    g = np.random.default_rng(seed)
    for levels in (every_level(bits), every_level(bits)[1:]) if bits > 2 else (every_level(bits),):
        own = np.concatenate([levels[[0, -1]], g.choice(levels, columns)]) * g.choice([0.75, -0.0078125])
        codes, scales = quantize(torch.from_numpy(own).float()[None], bits, 8, squares=True)
        assert (every_level(bits)[codes.numpy()] * scales.double().numpy() == own).all()


@pytest.mark.parametrize(("bits", "most"), [(1, 0.37), (2, 0.117), (3, 0.035), (4, 0.0095), (6, 0.00062), (8, 4e-5)])
def test_gaussian_error_is_near_that_of_the_best_uniform_levels(bits: int, most: float) -> None:
    """Max, "Quantizing for minimum distortion", 1960, has 0.363, 0.119, 0.0374 and 0.0115 for one scale that knows the
    law; here each 64 entries have a scale of their own, so a little less is possible."""
    x = torch.randn(200, 640, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(x, bits, 64, squares=True)
    back = every_level(bits)[codes.numpy()] * scales.double().numpy().repeat(64, axis=1)
    assert float(((back - x.double().numpy()) ** 2).mean()) < most


def test_the_scale_is_better_than_the_largest_entry_gives_and_zeros_stay_zeros() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    x[0] = 0
    x[1, 3:] = 0
    for bits in (2, 3, 4):
        assert quantize(x, bits, 64, squares=False)[1][0] == 0
        codes, scales = quantize(x, bits, 64, squares=True)
        back = every_level(bits)[codes.numpy()] * scales.double().numpy()
        assert scales[0] == 0
        assert (back[0] == 0).all()
        assert bits == 2 or (back[1, 3:] == 0).all()
        ends = np.abs(x.numpy()).max(axis=1, keepdims=True) / -every_level(bits)[0]
        plain = np.abs(every_level(bits)[:, None, None] * np.maximum(ends, 1e-30) - x.double().numpy()).min(axis=0)
        assert ((back - x.double().numpy()) ** 2).sum() < (plain**2).sum()


@pytest.mark.parametrize("shape", [(3, GRID + 100), (700, 300), (1, 1), (5, 0), (0, 4), (2, 3, 4), (GRID * 2, 1)])
def test_pieces_cover_a_tensor_and_split_no_group(shape: tuple[int, ...]) -> None:
    found = list(spans(shape, 48))
    columns = math.prod(shape[1:])
    assert [a for a, _, _ in found[1:]] == [b for _, b, _ in found[:-1]]
    if found:
        assert (found[0][0], found[-1][1]) == (0, math.prod(shape))
    for a, b, rows in found:
        assert b - a <= max(GRID, columns)
        assert (a % columns % 48, b - a) == (0, rows * columns) or rows == 1 if columns else a == b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("center", "bits", "group", "scale"), [("mean", 3, 64, "covering"), ("base", 5, 24, "squares")]
)
def test_tasks_come_out_as_the_formula_says(
    write: Maker, tmp_path: Path, dtype: torch.dtype, center: str, bits: int, group: int, scale: str
) -> None:
    """The formula in numpy float64 from the stored tensors, and the center from the inputs."""
    models = draw(3, dtype)
    parameters = {"bits": bits, "group": group, "center": center, "scale": scale}
    merge(recipe(write(models), **parameters), tmp_path / "bundle", device="cpu", threads=1)
    merge(recipe(write(models), **parameters), tmp_path / "small", device="cpu", max_memory="12MiB", shard_size=50_000)
    with open_bundle(tmp_path / "bundle") as bundle, open_bundle(tmp_path / "small") as small:
        assert bundle.manifest.digests == small.manifest.digests
        stored = {n: bundle.stored.read(n, 0, math.prod(i.shape)) for n, i in bundle.stored.tensors.items()}
        for t, task in enumerate(bundle.tasks):
            recover(tmp_path / "bundle", task, tmp_path / task, device="cpu", threads=1 + t % 2)
            found, state = load_file(tmp_path / task / "model.safetensors"), bundle.state_dict(task)
            assert set(found) == set(SHAPES) == set(state)
            assert torch.equal(found["norm.weight"], models[t + 1]["norm.weight"])
            for n in ("a.weight", "c.weight"):
                middle = models[0][n].double()
                if center == "mean":
                    middle = (sum(m[n].double() for m in models[1:]) / 3).to(dtype).double()  # type: ignore[union-attr]
                kept = stored[f"{center}/{n}"].view(SHAPES[n]).double()
                assert (kept - middle).abs().max() <= (1e-6 if dtype == torch.float32 else middle.abs().max() / 256)
                rows, columns = SHAPES[n][0], math.prod(SHAPES[n][1:])
                codes = unpack_codes(stored[f"codes/{task}/{n}"], rows * columns, bits).view(rows, columns)
                steps = stored[f"scales/{task}/{n}"].double().view(rows, -1).numpy().repeat(group, axis=1)[:, :columns]
                want = kept.view(rows, columns).numpy() + every_level(bits)[codes.numpy()] * steps
                # sums of a 16-bit number and an exact product have one fp32 rounding before the last
                want = torch.from_numpy(want).float().to(dtype).view(SHAPES[n])
                assert torch.equal(found[n], want), n
                assert torch.equal(state[n], found[n])
                off = (found[n].double() - models[t + 1][n].double()).square().mean().sqrt()
                assert off < (0.03 if bits == 3 else 0.005)


def test_a_swap_gives_the_bits_of_a_recovered_folder(write: Maker, tmp_path: Path) -> None:
    """A tensor long enough for several runs, in groups that fit neither rows nor runs."""
    models = draw(2, shapes={"weight": (3000, 1500)})
    merge(recipe(write(models), bits=3, group=40), tmp_path / "bundle", device="cpu")
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(3000, 1500, dtype=torch.bfloat16))
    with open_bundle(tmp_path / "bundle") as bundle:
        for task in ("t1", "t0"):
            recover(tmp_path / "bundle", task, tmp_path / task, device="cpu")
            want = load_file(tmp_path / task / "model.safetensors")["weight"]
            bundle.load_into(module, task)
            assert torch.equal(module.weight.detach(), want)
        bundle.hold()
        bundle.load_into(module, "t0", threads=1)
        assert torch.equal(module.weight.detach(), want)
        assert not torch.equal(want, bundle.state_dict("t1")["weight"])


def test_a_bundle_takes_what_the_formula_says_and_explains_itself(write: Maker, tmp_path: Path) -> None:
    models = draw(4, shapes={"w": (600, 800)})
    paths = write(models)
    for bits in (1, 3, 6):
        out = tmp_path / f"b{bits}"
        result = merge(recipe(paths, bits=bits), out, device="cpu")
        ours = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        packed = sum(Path(p).stat().st_size for p in paths[1:])
        groups = 600 * math.ceil(800 / 64)
        assert result.report["details"]["storage"]["bytes"] == {
            "mean": 960_000,
            "codes": 4 * 60_000 * bits,
            "scales": 4 * 2 * groups,
            "total": 960_000 + 240_000 * bits + 8 * groups,
        }
        assert ours / packed == pytest.approx((1 + 4 * (bits + 16 / 64) / 16) / 4, rel=0.02)
        assert verify(out).problems == []
        errors, moved = (result.report["notes"]["w"][k] for k in ("squared_error", "squared_task_vector"))
        assert all(0 < e < m for e, m in zip(errors, moved, strict=True))
        with open_bundle(out) as bundle:
            found = (bundle.state_dict("t2")["w"].double() - models[3]["w"].double()).square().sum()
            assert errors[2] == pytest.approx(float(found), rel=0.1)  # the note is from before the cast
    assert any("codes" in line for line in inspect(tmp_path / "b3").summary_lines())


def test_bits_of_each_task_and_tensor(write: Maker, tmp_path: Path) -> None:
    paths = write(draw(2))
    packing = recipe(paths, bits=[{"filter": "a", "value": 2}, {"value": 7}])
    packing["models"][1]["parameters"] = {"bits": 5}
    merge(packing, tmp_path / "bundle", device="cpu")
    with open_bundle(tmp_path / "bundle") as bundle:
        sizes = {n: i.shape for n, i in bundle.stored.tensors.items()}
        assert sizes["codes/t0/a.weight"] == (75_000 * 2 // 8,)
        assert sizes["codes/t0/c.weight"] == (-(-900 * 7 // 8),)
        assert sizes["codes/t1/a.weight"] == (-(-75_000 * 5 // 8),)
        assert bundle.tensors("t0")["a.weight"].call == {"group": 64, "bits": 2}


@pytest.mark.parametrize("center", ["mean", "base"])
def test_degenerate_tasks(write: Maker, tmp_path: Path, center: str) -> None:
    base, one, two = draw(2)
    merge(recipe(write([base, one, one, one]), bits=1, center="mean"), tmp_path / "same", device="cpu")
    with open_bundle(tmp_path / "same") as bundle:
        assert all(torch.equal(bundle.state_dict(t)[n], w) for t in bundle.tasks for n, w in one.items())
    merge(recipe(write([base, one]), bits=1), tmp_path / "alone", device="cpu")
    with open_bundle(tmp_path / "alone") as bundle:
        assert all(torch.equal(bundle.state_dict("t0")[n], w) for n, w in one.items())
    merge(recipe(write([base, base, two]), bits=3, center=center), tmp_path / "zero", device="cpu")
    with open_bundle(tmp_path / "zero") as bundle:
        if center == "base":
            assert all(torch.equal(bundle.state_dict("t0")[n], w) for n, w in base.items())
        assert any(n.startswith(f"{center}/") for n in bundle.stored.tensors)
        assert not torch.equal(bundle.state_dict("t1")["a.weight"], base["a.weight"])


def test_what_only_a_task_has_and_what_is_small_is_exact(write: Maker, tmp_path: Path) -> None:
    base, one, two = draw(2)
    one["head.weight"] = torch.randn(4, 4).bfloat16()
    two["c.weight"] = torch.randn(4, 5).bfloat16()
    for m in (base, one, two):
        m["ids"], m["empty"], m["thin"] = torch.arange(3), torch.zeros(0, 4).bfloat16(), torch.randn(300, 1).bfloat16()
        m["scalar"] = torch.randn(()).bfloat16()
    del two["a.weight"]
    result = merge(recipe(write([base, one, two]), bits=2), tmp_path / "bundle", device="cpu")
    with open_bundle(tmp_path / "bundle") as bundle:
        first, second = bundle.state_dict("t0"), bundle.state_dict("t1")
        assert (set(first), set(second)) == (set(one), set(two))
        for n in ("head.weight", "ids", "empty", "thin", "scalar", "norm.weight", "a.weight"):
            assert torch.equal(first[n], one[n]), n  # a.weight: a mean of one
        assert all(torch.equal(second[n], w) for n, w in two.items() if n != "b.weight")
        assert "mean/thin" not in bundle.stored.tensors
    assert verify(tmp_path / "bundle").problems == []
    assert result.report["details"]["storage"]["bytes"]["own"] > 0


def test_another_dtype_is_every_tensor_s(write: Maker, tmp_path: Path) -> None:
    models = draw(2, torch.float32)
    merge({**recipe(write(models), bits=8), "dtype": "bfloat16"}, tmp_path / "bundle", device="cpu")
    with open_bundle(tmp_path / "bundle") as bundle:
        state = bundle.state_dict("t1")
        assert {w.dtype for w in state.values()} == {torch.bfloat16}
        assert torch.equal(state["norm.weight"], models[2]["norm.weight"].bfloat16())
        assert torch.allclose(state["a.weight"].float(), models[2]["a.weight"], atol=0.01, rtol=0.005)


def test_bad_input(write: Maker, tmp_path: Path) -> None:
    models = draw(2)
    paths = write(models)
    for wrong, words in (({"bits": 9}, "bits"), ({"group": 4}, "group"), ({"center": "median"}, "center")):
        with pytest.raises(RecipeError, match=words):
            merge(recipe(paths, **wrong), tmp_path / "out", device="cpu")
    models[1]["a.weight"][1, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"a\.weight"):
        merge(recipe(write(models)), tmp_path / "out", device="cpu")
    merge({**recipe(write(models), bits=4), "nonfinite": "allow"}, tmp_path / "nan", device="cpu")
    with open_bundle(tmp_path / "nan") as bundle:
        spoilt = bundle.state_dict("t0")["a.weight"].isnan()
        assert spoilt[1, :64].all()  # its group, and no other
        assert int(spoilt.sum()) == 64


@pytest.mark.parametrize(
    "change", [{"bits": 5}, {"bits": 0}, {"bits": "4"}, {"group": 32}, {"group": 0}, {"bits": None}, {"bits": 1 << 40}]
)
def test_a_bundle_whose_numbers_do_not_fit_is_refused(write: Maker, tmp_path: Path, change: dict[str, Any]) -> None:
    merge(recipe(write(draw(2))), tmp_path / "bundle", device="cpu")
    path = tmp_path / "bundle" / "bundle.json"
    content = json.loads(path.read_text())
    for tensor in content["tensors"]:
        if tensor["code"] == "offsets":
            tensor["call"].update(change)
            tensor["numbers"] = {}
            if "bits" not in change:
                tensor["call"]["bits"] = 4
    path.write_text(json.dumps(content))
    with open_bundle(tmp_path / "bundle") as bundle, pytest.raises(CheckpointError, match="does not fit what is"):
        bundle.state_dict("t0")["a.weight"]


def test_jobs_are_plain_data() -> None:
    """They are pickled for workers and hashed into a plan's fingerprint."""
    job = Quantizing((2, 3), ("BF16",) * 2, "BF16", (4,), 64, True, False)
    assert hash(job) == hash(Quantizing((2, 3), ("BF16",) * 2, "BF16", (4,), 64, True, False))
