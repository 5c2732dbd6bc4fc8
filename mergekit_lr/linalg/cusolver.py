"""Three cuSOLVER routines that torch does not expose, called by ctypes in the library that torch ships.

torch loops serially over batched symmetric eigenproblems above n = 32 (50-250 times slower than
``cusolverDnXsyevBatched``), cannot compute only the largest eigenpairs (``cusolverDnXsyevdx``), and has no polar SVD
(``cusolverDnXgesvdp``). Each function here returns None where the routine cannot be had (no CUDA, an older library,
another dtype, a nonzero status), and the caller takes torch's own path. Results are column-major in cuSOLVER, so
vectors come back as rows and are transposed.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

VECTORS, LOWER, RANGE_BY_INDEX = 1, 0, 1002  # CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER, CUSOLVER_EIG_RANGE_I
DATA_TYPE = {torch.float32: 0, torch.float64: 1}  # CUDA_R_32F, CUDA_R_64F
FIRST_VERSION = {
    "cusolverDnXsyevdx": 11000,  # CUDA 11.1
    "cusolverDnXgesvdp": 11000,
    "cusolverDnXsyevBatched": 11701,  # CUDA 12.6 update 2
}
"""Smallest ``cusolverGetVersion`` (major * 1000 + minor * 100 + patch) that has each routine."""

Arguments = tuple[Any, ...]
SONAMES = ("libcusolver.so.12", "libcusolver.so.11", "libcusolver.so")


class Library(Protocol):
    """What `Solver` needs of a loaded libcusolver: attributes that are C functions."""

    def __getattr__(self, name: str) -> Any: ...


class Solver:
    """A libcusolver with checked versions and one handle for each device.

    Args:
        library: a `ctypes.CDLL`, or an object with the same functions.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        version = c_int(0)
        status = library.cusolverGetVersion(ctypes.byref(version))
        self.version = version.value if status == 0 else 0
        self._handles: dict[int, tuple[c_void_p, c_void_p]] = {}

    def has(self, routine: str) -> bool:
        """Whether the library is new enough for ``routine`` and really exports it."""
        if self.version < FIRST_VERSION[routine]:
            return False
        try:
            getattr(self._library, routine)
            getattr(self._library, f"{routine}_bufferSize")
        except AttributeError:
            return False
        return True

    def _handle(self, device: int, stream: int) -> tuple[c_void_p, c_void_p] | None:
        found = self._handles.get(device)
        if found is None:
            handle, params = c_void_p(), c_void_p()
            if self._library.cusolverDnCreate(ctypes.byref(handle)) != 0:
                return None
            if self._library.cusolverDnCreateParams(ctypes.byref(params)) != 0:
                self._library.cusolverDnDestroy(handle)
                return None
            found = self._handles[device] = (handle, params)
        if self._library.cusolverDnSetStream(found[0], c_void_p(stream)) != 0:
            return None
        return found

    def run(self, routine: str, like: Tensor, head: Arguments, after: Arguments, after_query: Arguments = ()) -> bool:
        """``routine_bufferSize(handle, params, *head, sizes, *after_query)``, then the routine itself with
        workspaces.

        True if both statuses are 0.
        """
        handle = self._handle(like.device.index or 0, _stream(like))
        if handle is None:
            return False
        on_device, on_host = c_size_t(0), c_size_t(0)
        sizes = (ctypes.byref(on_device), ctypes.byref(on_host))
        if getattr(self._library, f"{routine}_bufferSize")(*handle, *head, *sizes, *after_query) != 0:
            return False
        device_space = torch.empty(max(1, on_device.value), dtype=torch.uint8, device=like.device)
        host_space = (ctypes.c_uint8 * max(1, on_host.value))()
        spaces = (_pointer(device_space), on_device, ctypes.cast(host_space, c_void_p), on_host)
        return bool(getattr(self._library, routine)(*handle, *head, *spaces, *after) == 0)


def eigh_batched(g: Tensor, solver: Solver | None = None) -> tuple[Tensor, Tensor] | None:
    """Eigenpairs of ``[B, n, n]`` by XsyevBatched: values ``[B, n]`` ascending, vectors ``[B, n, n]``; or None."""
    solver = solver or _usable(g)
    if solver is None or g.dtype not in DATA_TYPE or g.ndim != 3 or not solver.has("cusolverDnXsyevBatched"):
        return None
    batch, n = g.shape[0], g.shape[1]
    a = g.contiguous().clone()  # overwritten by the vectors; symmetric, so its order does not matter
    w = torch.empty(batch, n, dtype=g.dtype, device=g.device)
    info = torch.zeros(batch, dtype=torch.int32, device=g.device)
    kind = c_int(DATA_TYPE[g.dtype])
    head = (c_int(VECTORS), c_int(LOWER), c_int64(n), kind, _pointer(a), c_int64(n), kind, _pointer(w), kind)
    count = c_int64(batch)
    ok = solver.run("cusolverDnXsyevBatched", g, head, (_pointer(info), count), after_query=(count,))
    if not ok or bool(info.any()):
        return None
    return w, a.transpose(1, 2)


def eigh_largest(g: Tensor, rank: int, solver: Solver | None = None) -> tuple[Tensor, Tensor] | None:
    """The ``rank`` largest eigenpairs of ``[n, n]`` by ``Xsyevdx``: values ``[rank]`` ascending, vectors ``[n,
    rank]``; or None.

    Saves the back-transformation of the other n - rank vectors, not the tridiagonalisation.
    """
    solver = solver or _usable(g)
    if solver is None or g.dtype not in DATA_TYPE or g.ndim != 2 or not solver.has("cusolverDnXsyevdx"):
        return None
    n = g.shape[0]
    a = g.contiguous().clone()
    w = torch.empty(n, dtype=g.dtype, device=g.device)
    info = torch.zeros(1, dtype=torch.int32, device=g.device)
    found, kind = c_int64(0), c_int(DATA_TYPE[g.dtype])
    unused = ctypes.c_double(0.0)  # interval ends, read only for a range by value
    head = (
        *(c_int(VECTORS), c_int(RANGE_BY_INDEX), c_int(LOWER), c_int64(n), kind, _pointer(a), c_int64(n)),
        *(ctypes.byref(unused), ctypes.byref(unused), c_int64(n - rank + 1), c_int64(n), ctypes.byref(found)),
        *(kind, _pointer(w), kind),
    )
    ok = solver.run("cusolverDnXsyevdx", g, head, (_pointer(info),))
    if not ok or bool(info.any()) or found.value != rank:
        return None
    return w[:rank], a[:rank].T


def gesvdp(matrix: Tensor, solver: Solver | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Thin SVD by polar decomposition (``Xgesvdp``): U ``[m, p]``, S ``[p]`` descending, Vh ``[p, n]``; or None.

    cuSOLVER perturbs near-singular matrices and reports by how much; above 1e-6 sigma_1 (fp32; 1e-13 fp64) the answer
    is None.
    """
    solver = solver or _usable(matrix)
    if solver is None or matrix.dtype not in DATA_TYPE or not solver.has("cusolverDnXgesvdp"):
        return None
    m, n = matrix.shape
    p = min(m, n)
    a = matrix.T.contiguous().clone()  # column-major A
    s = torch.empty(p, dtype=matrix.dtype, device=matrix.device)
    u, v = (torch.empty(p, k, dtype=matrix.dtype, device=matrix.device) for k in (m, n))  # column-major
    info = torch.zeros(1, dtype=torch.int32, device=matrix.device)
    perturbed, kind = ctypes.c_double(0.0), c_int(DATA_TYPE[matrix.dtype])
    head = (
        *(c_int(VECTORS), c_int(1), c_int64(m), c_int64(n), kind, _pointer(a), c_int64(m), kind, _pointer(s)),
        *(kind, _pointer(u), c_int64(m), kind, _pointer(v), c_int64(n), kind),
    )
    ok = solver.run("cusolverDnXgesvdp", matrix, head, (_pointer(info), ctypes.byref(perturbed)))
    limit = 1e-6 if matrix.dtype == torch.float32 else 1e-13
    if not ok or bool(info.any()) or not perturbed.value <= limit * float(s[0]):
        return None
    return u.T, s, v


def _usable(like: Tensor) -> Solver | None:
    return load() if like.device.type == "cuda" else None


@cache
def load() -> Solver | None:
    """The libcusolver of this process's torch, or None. Looked up once."""
    if not torch.cuda.is_available():
        return None
    names = [*SONAMES, *_wheel_libraries()]
    for name in names:
        try:
            return Solver(ctypes.CDLL(name))
        except OSError:  # not under this name; the next one, or torch's own path
            continue
    return None


def _wheel_libraries() -> list[str]:
    """libcusolver files of NVIDIA's wheels beside this interpreter's packages."""
    return [str(p) for root in sys.path for p in sorted(Path(root).glob("nvidia/*/lib/libcusolver.so.*"))]


def _pointer(t: Tensor) -> c_void_p:
    return c_void_p(t.data_ptr())


def _stream(like: Tensor) -> int:
    return int(torch.cuda.current_stream(like.device).cuda_stream) if like.device.type == "cuda" else 0
