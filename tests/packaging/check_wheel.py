"""Builds the wheel and uses it from an empty folder, where nothing of the source tree can be imported by chance.

Not collected by pytest: `make test` runs it after the suite.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = {"mergekit_lr": ROOT / "mergekit_lr", "methods": ROOT / "methods", "configs": ROOT / "configs"}


def expected() -> set[str]:
    """What the wheel must hold, read off the tree: every module, the marker of types, recipes, templates."""
    wanted = set()
    for name, folder in INSTALLED.items():
        prefix = "mergekit_lr" if name == "mergekit_lr" else f"mergekit_lr/{name}"
        for pattern in ("*.py", "py.typed", "*.yml", "*.jinja"):
            for path in folder.rglob(pattern):
                relative = path.relative_to(folder)
                if name == "mergekit_lr" and relative.parts[0] in ("methods", "configs"):
                    continue  # links to the top-level folders, counted there
                wanted.add(f"{prefix}/{relative.as_posix()}")
    return wanted


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack what an earlier build left there
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", scratch, str(ROOT))
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as z:
            held = {n for n in z.namelist() if ".dist-info/" not in n}
        if held != expected():
            sys.exit(f"wheel and tree differ: {sorted(held ^ expected())}")
        site, empty = Path(scratch) / "site", Path(scratch) / "empty"
        empty.mkdir()
        run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel))
        found = subprocess.run(
            [sys.executable, "-S", "-c", USE, str(site), str(ROOT), *sys.path],
            cwd=empty,
            check=True,
            capture_output=True,
            text=True,
        )
        print(f"wheel: {len(held)} files, {found.stdout.strip()}")


USE = """
import sys
site, root, *rest = sys.argv[1:]
sys.path[:] = [site] + [p for p in rest if p and not p.startswith(root + "/tests") and p != root]
import mergekit_lr
assert mergekit_lr.__file__.startswith(site), mergekit_lr.__file__
from mergekit_lr.registry import builtin_methods
from importlib.resources import files
recipes = [f.name for f in files("mergekit_lr.configs").iterdir() if f.name.endswith(".yml")]
assert recipes and builtin_methods()
print(f"{len(builtin_methods())} methods, {len(recipes)} recipes")
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
