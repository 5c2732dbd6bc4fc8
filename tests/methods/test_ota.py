"""OTA and Fisher against values worked out by hand, float64 references and full sorts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr import selection
from mergekit_lr.method import Call, Piece
from mergekit_lr.pieces import apply
from mergekit_lr.preconditioned import bias_correction, saliency
from mergekit_lr.registry import tensor_method

OTA, FISHER = tensor_method("ota"), tensor_method("fisher")


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def ota(deltas: list[Any], v: list[Any], each: list[dict[str, Any]] | None = None, **more: Any) -> torch.Tensor:
    facts = more.pop("facts", None)
    tensors, curvature = [torch.as_tensor(d) for d in deltas], [torch.as_tensor(x) for x in v]
    own = [{"curvature": "x", **e} for e in (each or [{}] * len(tensors))]
    base = torch.zeros_like(tensors[0])
    return apply(OTA, tensors, base, merge=more, models=own, extra=curvature, facts=facts)


def test_two_and_twelve_fifths() -> None:
    assert ota([t(3), t(0)], [t(4), t(1)]).tolist() == [2.0]
    assert ota([t(3), t(0)], [t(4), t(1)], power=1).tolist() == pytest.approx([12 / 5])
    models = [{"curvature": "x"}] * 2
    assert apply(FISHER, [t(3), t(0)], None, models=models, extra=[t(4), t(1)]).tolist() == pytest.approx([12 / 5])


def test_a_masked_model_counts_in_the_divisor_or_not() -> None:
    each = [{"density": 0.0}, {}]
    assert ota([t(3), t(6)], [t(4), t(1)], each, denominator="all").tolist() == [2.0]
    assert ota([t(3), t(6)], [t(4), t(1)], each, denominator="kept").tolist() == [6.0]


def test_grafting_by_hand() -> None:
    """Saliencies 9, 4, 25, 0: half of them are the entries 0 and 2."""
    d, v = t(3, 2, 1, 5), t(1, 1, 25, 0)
    assert saliency(d, v).square().tolist() == [9, 4, 25, 0]
    for scope in ("model", "tensor"):
        assert ota([d], [v], [{"density": 0.5}], density_scope=scope).tolist() == [3, 0, 1, 0]
    assert ota([d], [v], [{"threshold": 4.0}]).tolist() == [3, 2, 1, 0]
    assert ota([d], [v], [{"threshold": 4.0 / 0.19}], facts=[{"step": "2", "beta2": "0.9"}]).tolist() == [3, 2, 1, 0]
    # An entry of no saliency is kept at density 1 only: it would pull others' values towards zero.
    assert ota([d], [v], [{"density": 0.999}]).tolist() == [3, 2, 1, 0]
    assert ota([d], [v], [{"density": 1.0}], power=0).tolist() == [3, 2, 1, 5]


def test_second_moments_of_1e_18_are_not_drowned() -> None:
    """The authors' absolute epsilon of 1e-8 gives 0 here, the base."""
    assert ota([t(0.5), t(1.0)], [t(1e-18), t(1e-18)]).tolist() == pytest.approx([0.75])
    for power in (0.5, 1.0):
        assert ota([t(1e-6), t(2e-6)], [t(1e-40), t(1e-40)], power=power).tolist() == pytest.approx([1.5e-6])
    assert float(saliency(t(1e-6), t(1e-30))) == pytest.approx(1e-21)
    assert float(t(1e-36) * t(1e-6).square()) == 0.0  # what the literal formula gives
    assert float(saliency(t(1e-6), t(1e-36))) == pytest.approx(1e-24)


def test_epsilon_is_a_share_of_the_mean_weight() -> None:
    v = [t(1e-18, 3e-18), t(3e-18, 1e-18)]
    small, large = ota([t(1, 1), t(0, 0)], v, power=1), ota([t(1, 1), t(0, 0)], v, power=1, epsilon=1.0)
    assert small.tolist() == pytest.approx([0.25, 0.75])
    # mean weight 2e-18 of each model is added: (1 + 2) / (4 + 4) and (3 + 2) / (4 + 4)
    assert large.tolist() == pytest.approx([3 / 8, 5 / 8])


def test_no_curvature_at_all_leaves_the_base_or_the_mean() -> None:
    d, v = [t(1, 1), t(3, 3)], [t(0, 1), t(0, 1)]
    assert ota(d, v).tolist() == [0, 2]
    assert ota(d, v, fallback="mean").tolist() == [2, 2]
    assert ota(d, v, power=0).tolist() == [2, 2]
    models = [{"curvature": "x"}] * 2
    assert apply(OTA, d, None, models=models, extra=v).tolist() == [2, 2]  # no base to fall back to


def test_bias_correction() -> None:
    """After 234 steps at 0.999 Adam holds 0.21 of its weight, after 2611 steps 0.93."""
    early, late = {"step": "234", "beta2": "0.999"}, {"step": "2611", "beta2": "0.999"}
    assert 1 / bias_correction(early) == pytest.approx(1 - 0.999**234)
    assert 1 / bias_correction(early) == pytest.approx(0.21, abs=0.002)
    assert 1 / bias_correction(late) == pytest.approx(0.93, abs=0.004)
    assert bias_correction({**early, "bias_corrected": "true"}) == 1
    assert bias_correction({"step": "0", "beta2": "0.999"}) == bias_correction({"beta2": "2"}) == 1
    a, b = 1 / (1 - 0.999**234), 1 / (1 - 0.999**2611)
    out = ota([t(1), t(0)], [t(1), t(1)], power=1, facts=[early, late])
    assert out.tolist() == pytest.approx([a / (a + b)])
    off = ota([t(1), t(0)], [t(1), t(1)], power=1, facts=[early, late], bias_correction=False)
    assert off.tolist() == pytest.approx([0.5])


def test_weights_scales_and_rescaling() -> None:
    each = [{"weight": 3.0}, {"weight": 1.0}]
    assert ota([t(1), t(0)], [t(1), t(1)], each).tolist() == [0.75]
    assert ota([t(1), t(0)], [t(1), t(1)], [{"scale": 3.0}, {}]).tolist() == [1.5]
    assert ota([t(1), t(0)], [t(1), t(1)], **{"lambda": 3.0}).tolist() == [1.5]
    d = t(3, 4, 0, 0, 12)
    v = t(1, 1, 1, 1, 0)
    assert ota([d], [v], [{"density": 0.4}], rescale="l2").tolist() == pytest.approx([7.8, 10.4, 0, 0, 0])
    assert ota([d], [v], [{"density": 0.4}], rescale="l1").tolist() == pytest.approx([3 * 19 / 7, 4 * 19 / 7, 0, 0, 0])


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_normalised_curvature_does_not_see_its_scale(scope: str) -> None:
    g = torch.Generator().manual_seed(0)
    d = [torch.randn(50, generator=g) for _ in range(2)]
    v = [torch.rand(50, generator=g) * 1e-15 for _ in range(2)]
    one = ota(d, v, normalize_curvature=scope)
    assert torch.allclose(one, ota(d, [v[0], v[1] * 1e6], normalize_curvature=scope), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(one, ota(d, [v[0], v[1] * 1e6]), rtol=1e-2)


def reference(d: Any, v: Any, keep: list[Any], power: float, all_: bool) -> Any:
    p = [x**power for x in v]
    top = sum(a * m * x for a, m, x in zip(p, keep, d, strict=True))
    bottom = sum(a * (1 if all_ else m) for a, m in zip(p, keep, strict=True))
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), 0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_against_float64_with_full_sorts(seed: int, power: float, all_: bool) -> None:
    rng = np.random.default_rng(seed)
    d = [rng.integers(-8, 9, 60) / 8 for _ in range(3)]  # many equal saliencies
    v = [(rng.integers(0, 3, 60) / 2.0) ** 2 for _ in range(3)]
    densities = rng.choice([0.1, 0.35, 0.7, 1.0], 3)
    keep = []
    for x, c, density in zip(d, v, densities, strict=True):
        s = np.sqrt(c) * np.abs(x)
        m = np.ones(60)
        if density < 1:
            m[np.argsort(-s, kind="stable")[int(density * 60) :]] = 0
            m[s == 0] = 0
        keep.append(m)
    got = ota(
        [x.astype(np.float32) for x in d],
        [x.astype(np.float32) for x in v],
        [{"density": float(x)} for x in densities],
        power=power,
        denominator="all" if all_ else "kept",
    )
    assert np.allclose(got.numpy(), reference(d, v, keep, power, all_), rtol=2e-5, atol=1e-6)


def test_the_threshold_found_by_histogram_is_that_of_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced onto the two-pass histogram, saliencies over thirty orders of magnitude, ties by index."""
    monkeypatch.setattr(selection, "SMALL", 0)
    monkeypatch.setattr(selection, "MOST_COLLECTED", 0)
    monkeypatch.setattr(selection, "MOST_COUNTED", 0)
    g = torch.Generator().manual_seed(0)
    n = 200_000
    d = torch.randn(n, generator=g)
    v = 10.0 ** (-torch.randint(0, 30, (n,), generator=g).float())
    v[1000:3000], d[1000:3000] = 1e-9, 0.5  # two thousand equal ones
    s = saliency(d, v)
    order = torch.argsort(s, descending=True, stable=True)
    rank = int((s > float(saliency(t(0.5), t(1e-9)))).sum()) + 700
    out = ota([d], [v], [{"density": rank / n}], power=0)
    kept = torch.zeros(n)
    kept[order[:rank]] = 1
    assert torch.equal((out != 0).float(), kept)
    assert int((out != 0).sum()) == rank


def test_without_masks_the_base_cancels() -> None:
    g = torch.Generator().manual_seed(1)
    w, base = [torch.randn(30, generator=g) for _ in range(3)], torch.randn(30, generator=g)
    v = [torch.rand(30, generator=g) for _ in range(3)]
    models = [{"curvature": "x"}] * 3
    on_deltas = apply(OTA, w, base, models=models, extra=v)
    assert torch.allclose(on_deltas, apply(OTA, w, None, models=models, extra=v), atol=1e-6)


def test_what_each_model_gives_adds_up() -> None:
    g = torch.Generator().manual_seed(2)
    d = [torch.randn(40, generator=g) for _ in range(3)]
    v = [torch.rand(40, generator=g) for _ in range(3)]
    own = tuple(OTA.PerModel(curvature="x", scale=s) for s in (1.0, 0.5, 2.0))
    call = Call("w", (40,), OTA.Merge(), own, True, facts=((), (), ()))
    piece = Piece(d, torch.zeros(40), 0, v)
    terms = OTA.terms(call, piece, None)  # type: ignore[attr-defined]
    assert torch.allclose(sum(terms), OTA.merge(call, piece, None), atol=1e-6)  # type: ignore[arg-type]


def test_parameters_that_make_no_sense() -> None:
    merge = OTA.Merge()
    with pytest.raises(ValueError, match="curvature"):
        OTA.PerModel()
    both = OTA.PerModel(curvature="x", density=0.5, threshold=1e-9)
    assert any("density and threshold" in p for p in OTA.problems(merge, (both,)))
    assert any("every weight is zero" in p for p in FISHER.problems(merge, (FISHER.PerModel(curvature="x", weight=0),)))
