"""The cuSOLVER shim against a library that reads its arguments as NVIDIA's header declares them."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mergekit_lr.linalg import cusolver
from mergekit_lr.linalg.cusolver import Solver

REAL = {0: np.float32, 1: np.float64}


def view(pointer: ctypes.c_void_p, count: int, kind: int) -> npt.NDArray[Any]:
    """Memory at a C pointer as an array."""
    size = count * np.dtype(REAL[kind]).itemsize
    assert pointer.value is not None
    return np.frombuffer((ctypes.c_char * size).from_address(pointer.value), dtype=REAL[kind])


def put(reference: Any, value: float) -> None:
    reference._obj.value = value


class FakeLibrary:
    """libcusolver's three routines in numpy, strict about the order and number of their arguments."""

    def __init__(self, version: int = 11704, fail: str = "", info: int = 0, perturbed: float = 0.0) -> None:
        self.version, self.fail, self.info, self.perturbed = version, fail, info, perturbed
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cusolver"):
            object.__getattribute__(self, "calls").append(name)
            if name == object.__getattribute__(self, "fail"):
                return lambda *_args: 7
        return object.__getattribute__(self, name)

    def cusolverGetVersion(self, out: Any) -> int:
        put(out, self.version)
        return 0

    def cusolverDnCreate(self, out: Any) -> int:
        put(out, 11)
        return 0

    def cusolverDnCreateParams(self, out: Any) -> int:
        put(out, 12)
        return 0

    def cusolverDnDestroy(self, handle: ctypes.c_void_p) -> int:
        return 0

    def cusolverDnSetStream(self, handle: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        assert handle.value == 11
        return 0

    def _sizes(self, on_device: Any, on_host: Any) -> int:
        put(on_device, 640)
        put(on_host, 64)
        return 0

    def _workspace(self, space: ctypes.c_void_p, bytes_: ctypes.c_size_t, host: Any, host_bytes: Any) -> None:
        assert (bytes_.value, host_bytes.value) == (640, 64) and space.value and host.value

    def cusolverDnXsyevBatched_bufferSize(
        self, handle: Any, params: Any, jobz: Any, uplo: Any, n: Any, ta: Any, a: Any, lda: Any, tw: Any, w: Any,
        compute: Any, on_device: Any, on_host: Any, batch: Any,
    ) -> int:  # fmt: skip
        assert (handle.value, params.value, jobz.value, uplo.value) == (11, 12, 1, 0) and lda.value == n.value
        assert ta.value == tw.value == compute.value and batch.value > 0
        return self._sizes(on_device, on_host)

    def cusolverDnXsyevBatched(
        self, handle: Any, params: Any, jobz: Any, uplo: Any, n: Any, ta: Any, a: Any, lda: Any, tw: Any, w: Any,
        compute: Any, space: Any, space_bytes: Any, host: Any, host_bytes: Any, info: Any, batch: Any,
    ) -> int:  # fmt: skip
        self._workspace(space, space_bytes, host, host_bytes)
        k, b = n.value, batch.value
        matrices = view(a, b * k * k, ta.value).reshape(b, k, k)
        values = view(w, b * k, tw.value).reshape(b, k)
        for i in range(b):
            lam, vectors = np.linalg.eigh(matrices[i].T)  # column-major
            values[i], matrices[i] = lam, vectors.T
        ctypes.c_int32.from_address(info.value).value = self.info
        return 0

    def cusolverDnXsyevdx_bufferSize(
        self, handle: Any, params: Any, jobz: Any, range_: Any, uplo: Any, n: Any, ta: Any, a: Any, lda: Any, vl: Any,
        vu: Any, il: Any, iu: Any, meig: Any, tw: Any, w: Any, compute: Any, on_device: Any, on_host: Any,
    ) -> int:  # fmt: skip
        assert (jobz.value, range_.value, uplo.value) == (1, 1002, 0) and 1 <= il.value <= iu.value <= n.value
        return self._sizes(on_device, on_host)

    def cusolverDnXsyevdx(
        self, handle: Any, params: Any, jobz: Any, range_: Any, uplo: Any, n: Any, ta: Any, a: Any, lda: Any, vl: Any,
        vu: Any, il: Any, iu: Any, meig: Any, tw: Any, w: Any, compute: Any, space: Any, space_bytes: Any, host: Any,
        host_bytes: Any, info: Any,
    ) -> int:  # fmt: skip
        self._workspace(space, space_bytes, host, host_bytes)
        k, first, last = n.value, il.value - 1, iu.value
        matrix = view(a, k * k, ta.value).reshape(k, k)
        lam, vectors = np.linalg.eigh(matrix.T)
        view(w, k, tw.value)[: last - first] = lam[first:last]
        matrix[: last - first] = vectors.T[first:last]
        put(meig, last - first)
        ctypes.c_int32.from_address(info.value).value = self.info
        return 0

    def cusolverDnXgesvdp_bufferSize(
        self, handle: Any, params: Any, jobz: Any, econ: Any, m: Any, n: Any, ta: Any, a: Any, lda: Any, ts: Any,
        s: Any, tu: Any, u: Any, ldu: Any, tv: Any, v: Any, ldv: Any, compute: Any, on_device: Any, on_host: Any,
    ) -> int:  # fmt: skip
        assert (jobz.value, econ.value) == (1, 1) and (lda.value, ldu.value, ldv.value) == (m.value, m.value, n.value)
        return self._sizes(on_device, on_host)

    def cusolverDnXgesvdp(
        self, handle: Any, params: Any, jobz: Any, econ: Any, m: Any, n: Any, ta: Any, a: Any, lda: Any, ts: Any,
        s: Any, tu: Any, u: Any, ldu: Any, tv: Any, v: Any, ldv: Any, compute: Any, space: Any, space_bytes: Any,
        host: Any, host_bytes: Any, info: Any, perturbed: Any,
    ) -> int:  # fmt: skip
        self._workspace(space, space_bytes, host, host_bytes)
        rows, columns = m.value, n.value
        p = min(rows, columns)
        matrix = view(a, rows * columns, ta.value).reshape(columns, rows).T
        left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
        view(s, p, ts.value)[:] = sigma
        view(u, rows * p, tu.value).reshape(p, rows)[:] = left.T
        view(v, columns * p, tv.value).reshape(p, columns)[:] = right  # V column-major is V^H row by row
        ctypes.c_int32.from_address(info.value).value = self.info
        put(perturbed, self.perturbed)
        return 0


@pytest.fixture
def symmetric() -> torch.Tensor:
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.standard_normal((3, 40, 50)))
    return a @ a.transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigh_batched(symmetric: torch.Tensor, dtype: torch.dtype) -> None:
    g = symmetric.to(dtype)
    before = g.clone()
    found = cusolver.eigh_batched(g, Solver(FakeLibrary()))
    assert found is not None and torch.equal(g, before)
    values, vectors = found
    torch.testing.assert_close(values, torch.linalg.eigvalsh(g), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(g @ vectors, vectors * values.unsqueeze(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigh_largest(symmetric: torch.Tensor, dtype: torch.dtype) -> None:
    g = symmetric[0].to(dtype)
    found = cusolver.eigh_largest(g, 5, Solver(FakeLibrary()))
    assert found is not None
    values, vectors = found
    torch.testing.assert_close(values, torch.linalg.eigvalsh(g)[-5:], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(g @ vectors, vectors * values, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
def test_gesvdp(shape: tuple[int, int]) -> None:
    a = torch.from_numpy(np.random.default_rng(1).standard_normal(shape))
    for given in (a, a.T.contiguous().T):  # either memory order
        found = cusolver.gesvdp(given, Solver(FakeLibrary()))
        assert found is not None
        u, s, vh = found
        torch.testing.assert_close((u * s) @ vh, a)
        assert bool((s.diff() <= 0).all())


@pytest.mark.parametrize(
    "library",
    [
        FakeLibrary(version=11600),  # before XsyevBatched
        FakeLibrary(fail="cusolverGetVersion"),
        FakeLibrary(fail="cusolverDnCreate"),
        FakeLibrary(fail="cusolverDnCreateParams"),
        FakeLibrary(fail="cusolverDnSetStream"),
        FakeLibrary(fail="cusolverDnXsyevBatched_bufferSize"),
        FakeLibrary(fail="cusolverDnXsyevBatched"),
        FakeLibrary(info=3),  # did not converge
    ],
)
def test_every_failure_means_torch(symmetric: torch.Tensor, library: FakeLibrary) -> None:
    assert cusolver.eigh_batched(symmetric, Solver(library)) is None


def test_what_the_routines_do_not_serve(symmetric: torch.Tensor) -> None:
    solver = Solver(FakeLibrary())
    assert cusolver.eigh_batched(symmetric.half(), solver) is None
    assert cusolver.eigh_batched(symmetric[0], solver) is None
    assert cusolver.eigh_largest(symmetric, 2, solver) is None
    assert cusolver.gesvdp(torch.ones(3, 3), Solver(FakeLibrary(perturbed=1e-2))) is None
    assert cusolver.gesvdp(torch.ones(3, 3), Solver(FakeLibrary(info=1))) is None

    class Older:  # exports nothing but the version
        def cusolverGetVersion(self, out: Any) -> int:
            put(out, 11704)
            return 0

    assert not Solver(Older()).has("cusolverDnXsyevBatched")


def test_one_handle_serves_a_device(symmetric: torch.Tensor) -> None:
    library = FakeLibrary()
    solver = Solver(library)
    for _ in range(3):
        assert cusolver.eigh_batched(symmetric, solver) is not None
    assert library.calls.count("cusolverDnCreate") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is meant")
def test_without_cuda_nothing_is_loaded(symmetric: torch.Tensor) -> None:
    assert cusolver.load() is None
    assert cusolver.eigh_batched(symmetric) is None
    assert cusolver.gesvdp(symmetric[0]) is None
