"""Only `mergekit_lr.linalg.exact` calls a full singular value decomposition; Triton is not needed to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import mergekit_lr

PACKAGE = Path(mergekit_lr.__file__).parent
FULL_SOLVERS = {"svd", "svdvals", "svd_lowrank", "pca_lowrank", "pinv", "matrix_rank", "gesdd", "gesvd", "nuclear_norm"}
ALLOWED = {"exact.py"}


def calls_of_full_solvers(source: str) -> list[str]:
    """Names reached as attributes of a module-like chain (torch.linalg.svd, np.linalg.pinv) or imported by name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in FULL_SOLVERS:
            found.append(f"{ast.unparse(node)} at line {node.lineno}")
        if isinstance(node, ast.ImportFrom):
            found += [f"import {a.name} at line {node.lineno}" for a in node.names if a.name in FULL_SOLVERS]
    return found


def sources() -> list[Path]:
    every = [*PACKAGE.rglob("*.py"), *(PACKAGE / "methods").rglob("*.py")]  # rglob does not follow the link
    return sorted({p for p in every if "linalg" not in p.parts or p.name not in ALLOWED})


def test_nothing_else_calls_the_full_svd() -> None:
    found = {str(p.relative_to(PACKAGE)): calls_of_full_solvers(p.read_text()) for p in sources()}
    assert {name: calls for name, calls in found.items() if calls} == {}
    assert any("methods" in p.parts for p in sources()), "methods/ must be covered"


def test_the_scan_sees_what_it_should() -> None:
    assert calls_of_full_solvers((PACKAGE / "linalg" / "exact.py").read_text())
    for line in ("torch.linalg.svd(a)", "x = np.linalg.pinv", "a.svd()", "from torch.linalg import svdvals"):
        assert calls_of_full_solvers(line)


def test_import_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import mergekit_lr.linalg"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
