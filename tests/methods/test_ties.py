"""TIES against the paper's algorithm 1 in float64, by sorting and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr.method import Call, Piece, Slicing
from mergekit_lr.pieces import apply, drive, fold_all, spans
from mergekit_lr.registry import get_method

METHOD = get_method("ties")
Array = npt.NDArray[np.float64]


def trim(d: Array, keep: int) -> Array:
    chosen = np.argsort(-np.abs(d), kind="stable")[:keep]
    out = np.zeros_like(d)
    out[chosen] = d[chosen]
    return out


def elect_and_merge(trimmed: Array, weights: Array, normalize: bool) -> Array:
    """``trimmed`` is [models, entries]."""
    x = weights[:, None] * trimmed
    sign = np.where(x.sum(0) >= 0, 1, -1)
    agree = np.sign(x) == sign
    total = (x * agree).sum(0)
    if not normalize:
        return total
    divisor = (weights[:, None] * agree).sum(0)
    return total / np.where(divisor == 0, 1, divisor)


def grid(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.float32]:
    """Multiples of 1/64 below 4: differences and sums are exact, and many magnitudes are equal."""
    return (rng.integers(-255, 256, shape) / 64).astype(np.float32)


def run(
    models: list[Any], base: Any, weights: list[float], densities: list[float], **merge: Any
) -> npt.NDArray[np.float32]:
    each = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]
    tensors = [torch.as_tensor(m) for m in models]
    return apply(METHOD, tensors, torch.as_tensor(base), merge=merge, models=each).numpy()


def test_by_hand() -> None:
    base = torch.zeros(6)
    a = torch.tensor([4.0, -1.0, 3.0, 0.5, -2.0, 0.0])
    b = torch.tensor([-1.0, -2.0, 5.0, 0.5, 3.0, 0.0])
    # half of each: a keeps 4, 3, -2; b keeps -2, 5, 3. Signs elected: + - + + +.
    assert run([a, b], base, [1, 1], [0.5, 0.5]).tolist() == [4.0, -2.0, 4.0, 0.0, 3.0, 0.0]
    assert run([a, b], base, [1, 1], [0.5, 0.5], normalize=False).tolist() == [4.0, -2.0, 8.0, 0.0, 3.0, 0.0]
    # a's weight turns the vote at the last but one entry: -2 * 2 against 3.
    assert run([a, b], base, [2, 1], [0.5, 0.5])[4] == -2.0
    half = apply(METHOD, [a, b], base, merge={"lambda": 0.5}, models=[{"weight": 1, "density": 0.5}] * 2)
    assert half.tolist() == [2.0, -1.0, 2.0, 0.0, 1.5, 0.0]


@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 80),
    weights=st.lists(st.sampled_from([-1.0, 0.25, 0.5, 1.0, 2.0]), min_size=1, max_size=4),
    density=st.floats(0, 1),
    normalize=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_against_float64(seed: int, n: int, weights: list[float], density: float, normalize: bool) -> None:
    rng = np.random.default_rng(seed)
    base, models = grid(rng, n), grid(rng, len(weights), n)
    deltas = models.astype(np.float64) - base
    keep = 0 if density <= 0 else max(1, int(density * n))
    trimmed = np.stack([trim(d, keep) for d in deltas])
    want = base + elect_and_merge(trimmed, np.array(weights), normalize)
    got = run(list(models), base, weights, [density] * len(weights), normalize=normalize)
    assert np.allclose(got, want, rtol=3e-7, atol=3e-7)


@given(seed=st.integers(0, 99), models=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_density_one_and_agreeing_signs_is_the_mean(seed: int, models: int) -> None:
    rng = np.random.default_rng(seed)
    base = grid(rng, 40)
    sign = rng.choice([-1, 1], 40).astype(np.float32)
    deltas = sign * (np.abs(grid(rng, models, 40)) + 1)
    got = run(list(base + deltas), base, [1.0] * models, [1.0] * models)
    assert np.allclose(got, base + deltas.mean(0), rtol=1e-6, atol=1e-6)


def test_scaling_all_weights_changes_nothing_when_normalized() -> None:
    rng = np.random.default_rng(0)
    base, models = grid(rng, 100), list(grid(rng, 3, 100))
    one = run(models, base, [1.0, 0.5, 0.25], [0.5] * 3)
    assert np.array_equal(one, run(models, base, [4.0, 2.0, 1.0], [0.5] * 3))


def test_densities_at_the_ends() -> None:
    rng = np.random.default_rng(1)
    base, a = grid(rng, 50), grid(rng, 50)
    assert np.array_equal(run([a], base, [1.0], [0.0]), base)
    assert np.array_equal(run([a], base, [1.0], [1.0]), a)
    one = run([a], base, [1.0], [1e-9])  # never fewer than one entry
    assert np.count_nonzero(one - base) == 1
    assert np.argmax(np.abs(one - base)) == np.argmax(np.abs(a - base))


def test_rescale_brings_back_the_l1_norm() -> None:
    rng = np.random.default_rng(2)
    base, a = np.zeros(1000, np.float32), grid(rng, 1000)
    got = run([a], base, [1.0], [0.3], rescale=True)
    assert np.isclose(np.abs(got).sum(), np.abs(a).sum(), rtol=1e-5)
    assert np.count_nonzero(got) == 300
    untouched = run([np.zeros_like(a)], base, [1.0], [0.3], rescale=True)
    assert not untouched.any()


def model_wide(
    tensors: dict[str, tuple[Array, Array]],
    density: float,
    special: dict[str, dict[str, Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """Two models of several tensors, base zero, through the passes as an engine drives them.

    ``special``: parameters of single tensors, ``scope`` and the densities ``a`` and ``b`` of the models.
    """

    def call_of(name: str, numel: int) -> Call:
        own = {"scope": "model", "a": density, "b": density} | (special or {}).get(name, {})
        merge = METHOD.Merge.model_validate({"threshold_scope": own["scope"]})
        each = [METHOD.PerModel.model_validate({"weight": 1.0, "density": own[m]}) for m in "ab"]
        return Call(name, (numel,), merge, tuple(each), True, 0, ("a", "b"))

    calls = [call_of(n, a.size) for n, (a, _) in tensors.items()]
    data = {n: [torch.from_numpy(x.astype(np.float32)) for x in pair] for n, pair in tensors.items()}

    def pieces(call: Call) -> Any:
        for s in spans(call.shape, Slicing.ELEMENTWISE, 1):
            yield call, Piece([x[s.start : s.stop] for x in data[call.name]], None, s.start)

    def look(calls: list[Call], wanted: Any) -> Any:
        return fold_all(wanted, (p for c in calls for p in pieces(c)))

    shared = drive(METHOD.model_statistics(calls), lambda w: look(calls, w))
    out = {}
    for call in calls:
        state = drive(METHOD.statistics(call, shared), lambda w, call=call: look([call], w))
        out[call.name] = torch.cat([METHOD.merge(call, piece, state) for _, piece in pieces(call)])
    return out


def test_model_scope_is_the_papers_trim_over_the_whole_task_vector() -> None:
    rng = np.random.default_rng(3)
    sizes = {"big": 70_000, "loud": 500, "quiet": 500, "one": 1}
    scale = {"big": 1.0, "loud": 8.0, "quiet": 1 / 64, "one": 1.0}
    tensors = {n: (grid(rng, k) * scale[n], grid(rng, k) * scale[n]) for n, k in sizes.items()}
    got = model_wide(tensors, 0.2)
    total = sum(sizes.values())
    whole = [np.concatenate([t[i] for t in tensors.values()]).astype(np.float64) for i in range(2)]
    trimmed = np.stack([trim(w, int(0.2 * total)) for w in whole])
    want = elect_and_merge(trimmed, np.ones(2), True)
    assert np.allclose(torch.cat(list(got.values())).numpy(), want, rtol=3e-7, atol=0)
    # The point of the whole-model trim: loud tensors keep more than a fifth, quiet ones nothing.
    assert np.count_nonzero(got["loud"]) > 0.5 * sizes["loud"]
    assert np.count_nonzero(got["quiet"]) == 0


def test_tensors_that_keep_all_or_nothing_or_their_own_scope_do_not_compete() -> None:
    rng = np.random.default_rng(5)
    sizes = {"x": 400, "all of a": 900, "none of b": 70_000, "own scope": 300, "y": 80_000}
    tensors = {n: (grid(rng, k), grid(rng, k)) for n, k in sizes.items()}
    special = {"all of a": {"a": 1.0}, "none of b": {"b": 0.0}, "own scope": {"scope": "tensor"}}
    got = model_wide(tensors, 0.25, special)
    competing = [{"x", "none of b", "y"}, {"x", "all of a", "y"}]
    trimmed: dict[str, list[Array]] = {n: [] for n in tensors}
    for i, names in enumerate(competing):
        chosen = {n: t[i].astype(np.float64) for n, t in tensors.items() if n in names}
        kept = trim(np.concatenate(list(chosen.values())), int(0.25 * sum(sizes[n] for n in names)))
        edges = np.cumsum([x.size for x in chosen.values()])[:-1]
        parts = dict(zip(chosen, np.split(kept, edges), strict=True))
        parts["own scope"] = trim(tensors["own scope"][i].astype(np.float64), 75)
        parts.setdefault("all of a", tensors["all of a"][i].astype(np.float64))
        parts.setdefault("none of b", np.zeros(sizes["none of b"]))
        for n in tensors:
            trimmed[n].append(parts[n])
    for n, found in got.items():
        want = elect_and_merge(np.stack(trimmed[n]), np.ones(2), True)
        assert np.allclose(found.numpy(), want, rtol=3e-7, atol=0), n


def test_model_scope_on_a_model_of_one_tensor_is_tensor_scope() -> None:
    rng = np.random.default_rng(4)
    base, models = grid(rng, 999), list(grid(rng, 3, 999))
    one = run(models, base, [1.0, 0.5, 2.0], [0.3, 0.4, 0.5])
    other = run(models, base, [1.0, 0.5, 2.0], [0.3, 0.4, 0.5], threshold_scope="model")
    assert np.array_equal(one, other)


@pytest.mark.parametrize("density", [-0.1, 1.1])
def test_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        run([torch.ones(2)], torch.zeros(2), [1.0], [density])
