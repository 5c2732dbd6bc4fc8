"""Exact selection against a stable sort, by every way that finds the threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lr import selection
from mergekit_lr.method import GRID, Call, Pass, Piece, Slicing
from mergekit_lr.pieces import drive, fold_all, sample_spans, spans
from mergekit_lr.sampling import Sample, Samples
from mergekit_lr.selection import Cut, Want, count_to_keep, select, select_model_wide
from mergekit_lr.statistics import piece_tensors

Floats = npt.NDArray[np.float32]


def by_sorting(x: Floats, keep: int) -> Floats:
    """The ``keep`` largest magnitudes, equal ones by lowest index, the rest zero."""
    chosen = np.argsort(-np.abs(x.astype(np.float64)), kind="stable")[:keep]
    out = np.zeros_like(x)
    out[chosen] = x[chosen]
    return out


@pytest.fixture(autouse=True)
def small_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a few hundred thousand elements go the way of large ones, to keep the tests short."""
    monkeypatch.setattr(selection, "SMALL", 1 << 18)


class Looks:
    """Drives passes over named vectors and notes which passes ran."""

    def __init__(self, vectors: dict[str, list[Floats]], most: int = GRID) -> None:
        self.vectors = {k: [torch.from_numpy(x) for x in v] for k, v in vectors.items()}
        self.most = most
        self.ran: list[str] = []

    def call(self, name: str) -> Call:
        return Call(name, tuple(self.vectors[name][0].shape), None, (), False)

    def __call__(self, wanted: Pass[Any, Any]) -> Any:
        self.ran.append(type(wanted).__name__)

        def pieces() -> Any:
            for name, xs in self.vectors.items():
                call = self.call(name)
                cut = sample_spans(call.shape, wanted.sample) if wanted.sample else None
                for s in cut or spans(call.shape, Slicing.ELEMENTWISE, self.most):
                    yield call, Piece([x[s.start : s.stop] for x in xs], None, s.start)

        return fold_all(wanted, pieces())

    def trimmed(self, name: str, stream: int, cut: Cut) -> Floats:
        x = self.vectors[name][stream]
        cuts = spans(self.call(name).shape, Slicing.ELEMENTWISE, self.most)
        return torch.cat([cut.trim(x[s.start : s.stop], s.start) for s in cuts]).numpy()


def kinds(n: int, seed: int = 0) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n).astype(np.float32)
    scales = np.repeat(10.0 ** rng.uniform(-3, 3, n // 1000 + 1), 1000)[:n]
    return {
        "smooth": x,
        "few values": np.round(x * 2) / 2,
        "bf16 steps": (torch.from_numpy(x).bfloat16().float() - torch.ones(n).bfloat16().float()).numpy(),
        "all equal": np.full(n, -0.5, np.float32),
        "all zero": np.zeros(n, np.float32),
        "mostly zero": np.where(rng.random(n) < 0.7, 0, x).astype(np.float32),
        "rows of different scale": (x * scales).astype(np.float32),
        "denormal": (x * 1e-42).astype(np.float32),
    }


@pytest.mark.parametrize("kind", kinds(8))
@pytest.mark.parametrize("n", [1, 2, 999, 70_000])
def test_small_tensors(kind: str, n: int) -> None:
    x = kinds(n)[kind]
    for most in (GRID, 2 * GRID):
        looks = Looks({"t": [x]}, most)
        for keep in {0, 1, n // 3, n // 2, n - 1, n}:
            (cut,) = drive(select(looks.call("t"), [Want(0, keep)]), looks)
            assert np.array_equal(looks.trimmed("t", 0, cut), by_sorting(x, keep))
    assert set(looks.ran) <= {"Collect"}


@pytest.mark.parametrize("collected", [1 << 22, 0], ids=["collect", "count"])
@pytest.mark.parametrize("counted", [1 << 18, 0], ids=["bracket", "histogram"])
@pytest.mark.parametrize("kind", kinds(8))
def test_large_tensors_by_every_way(kind: str, collected: int, counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MOST_COLLECTED", collected)
    monkeypatch.setattr(selection, "MOST_COUNTED", counted)
    n = 5 * GRID + 77
    x = kinds(n)[kind]
    looks = Looks({"t": [x]})
    wants = [Want(0, k) for k in (1, n // 10, n // 2, n - 2)]
    cuts = drive(select(looks.call("t"), wants), looks)
    for want, cut in zip(wants, cuts, strict=True):
        assert np.array_equal(looks.trimmed("t", 0, cut), by_sorting(x, want.keep))
    if collected == 0:
        assert "Collect" not in looks.ran
    if not collected and not counted:
        assert "Histogram" in looks.ran


def test_a_smooth_tensor_takes_one_look() -> None:
    n = 16 * GRID
    x = kinds(n)["smooth"]
    looks = Looks({"t": [x, x * 2]})
    drive(select(looks.call("t"), [Want(0, n // 2), Want(1, n // 5)]), looks)
    assert looks.ran == ["Sample", "Collect"]


def test_a_bracket_that_misses_is_no_disaster(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: Samples, want: Want) -> Any:
        return selection.Bracket(want, 0, 1)

    monkeypatch.setattr(Samples, "bracket", wrong)
    n = 5 * GRID
    x = kinds(n)["smooth"]
    looks = Looks({"t": [x]})
    (cut,) = drive(select(looks.call("t"), [Want(0, n // 3)]), looks)
    assert np.array_equal(looks.trimmed("t", 0, cut), by_sorting(x, n // 3))
    assert looks.ran == ["Sample", "Collect", "Histogram", "Count"]


@pytest.mark.parametrize("kind", ["smooth", "few values", "mostly zero", "all equal", "all zero"])
def test_model_wide_is_one_selection_over_all_tensors(kind: str) -> None:
    lengths = {"a": 70_000, "b": 3, "c": 5 * GRID + 1, "d": GRID}
    parts = {name: kinds(n, seed=i)[kind] for i, (name, n) in enumerate(lengths.items())}
    whole = np.concatenate(list(parts.values()))
    looks = Looks({name: [x, x[::-1].copy()] for name, x in parts.items()})
    for share in (0.0, 0.001, 0.3, 0.9, 1.0):
        keep = int(share * whole.size)
        cuts = drive(select_model_wide([Want(0, keep), Want(1, keep // 2)], whole.size), looks)
        got = np.concatenate([looks.trimmed(name, 0, cuts[0].for_tensor(name)) for name in parts])
        assert np.array_equal(got, by_sorting(whole, keep))
        other = np.concatenate([x[::-1] for x in parts.values()])
        got = np.concatenate([looks.trimmed(name, 1, cuts[1].for_tensor(name)) for name in parts])
        assert np.array_equal(got, by_sorting(other, keep // 2))


def test_model_wide_sample_stays_small() -> None:
    rng = np.random.default_rng(0)
    looks = Looks({f"t{i}": [rng.standard_normal(3 * GRID).astype(np.float32)] for i in range(8)})
    numel = 8 * 3 * GRID
    sample = Sample(piece_tensors, numel, most=2048)
    (found,) = looks(sample)
    assert found.bits.size == found.sizes.sum() <= 2 * 2048
    assert np.isclose(found.numel, numel)
    bracket = found.bracket(Want(0, numel // 2))
    middle = np.median(np.abs(np.concatenate([x[0].numpy() for x in looks.vectors.values()])))
    assert bracket is not None
    assert bracket.low < np.float32(middle).view(np.int32) < bracket.high


def test_tensors_of_different_scale_do_not_widen_a_models_bracket() -> None:
    rng = np.random.default_rng(0)
    x = {f"t{i}": [(rng.standard_normal(2 * GRID) * 10.0**i).astype(np.float32)] for i in range(4)}
    looks = Looks(x)
    drive(select_model_wide([Want(0, GRID)], 8 * GRID), looks)
    assert looks.ran[:2] == ["Sample", "Collect"]
    (found,) = looks(Sample(piece_tensors, 8 * GRID))
    bracket = found.bracket(Want(0, GRID))
    assert bracket is not None
    assert found.share(bracket) < 0.05


@given(
    values=st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=60),
    share=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_any_vector(values: list[float], share: float) -> None:
    x = np.array(values, np.float32)
    keep = count_to_keep(share, x.size)
    looks = Looks({"t": [x]})
    (cut,) = drive(select(looks.call("t"), [Want(0, keep)]), looks)
    assert np.array_equal(looks.trimmed("t", 0, cut), by_sorting(x, keep))


def test_count_to_keep_truncates() -> None:
    assert [count_to_keep(d, 10) for d in (0, 0.19, 0.5, 0.99, 1)] == [0, 1, 5, 9, 10]
    assert count_to_keep(0.29, 100) == 28  # 0.29 * 100 is 28.999999999999996
    assert count_to_keep(2.0, 5) == 5
    assert count_to_keep(-1.0, 5) == 0
