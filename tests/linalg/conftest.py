"""Matrices with known spectra, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from threadpoolctl import threadpool_limits

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before its first import

Float64 = npt.NDArray[np.float64]
SPECTRA = ("gauss", "flat", "power", "low rank", "clustered", "tiny tail")


def spectrum(kind: str, p: int, rng: np.random.Generator) -> Float64:
    """p singular values of the given kind, descending."""
    i = np.arange(1, p + 1)
    if kind == "flat":
        return np.ones(p)
    if kind == "power":
        return i ** -rng.uniform(0.4, 1.5)
    if kind == "low rank":
        return np.where(i <= max(1, p // 3), 1.0 / i, 0.0)
    if kind == "clustered":
        return np.repeat([1.0, 0.5, 0.1, 0.01], -(-p // 4))[:p]
    return np.where(i <= max(1, p // 4), 1.0, 10.0 ** -rng.uniform(2, 8)) * i**-0.3


def make_matrix(kind: str, m: int, n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """An m x n matrix with random singular vectors; ``kind`` is one of `SPECTRA`."""
    rng = np.random.default_rng(seed)
    if kind == "gauss":
        return torch.from_numpy(rng.standard_normal((m, n))).to(dtype)
    p = min(m, n)
    u = np.linalg.qr(rng.standard_normal((m, p)))[0]
    v = np.linalg.qr(rng.standard_normal((n, p)))[0]
    return torch.from_numpy((u * spectrum(kind, p, rng)) @ v.T).to(dtype)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other over 40 x 40 matrices make these tests fifty times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def matrix() -> Callable[..., torch.Tensor]:
    return make_matrix


@pytest.fixture(scope="session")
def spectra() -> tuple[str, ...]:
    return SPECTRA


@pytest.fixture
def far() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """``||got - want||_F / ||want||_F`` in fp64."""

    def distance(got: torch.Tensor, want: torch.Tensor) -> float:
        scale = float(torch.linalg.vector_norm(want.double()))
        return float(torch.linalg.vector_norm(got.double() - want.double())) / (scale or 1.0)

    return distance
