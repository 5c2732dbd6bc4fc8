"""mergekit 0.1.5 in a virtual environment of its own, made once and reused.

Run as a script it makes the environment and prints the folder of its commands::

    python tests/peer/environment.py

mergekit is installed with ``--no-deps``: its requirement list drags in packages that merging never imports, and pip
would be free to replace torch. What merging does import is named in :data:`NEEDS`.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_VARIABLE = "MERGEKIT_LR_PEER_DIR"
TORCH = ["torch==2.13.0"]  # first and alone, so that nothing later chooses another build
PEER = ["mergekit==0.1.5"]
NEEDS = [
    "transformers==5.23.0",
    "peft>=0.18,<1",
    "accelerate>=1.6,<2",
    "safetensors>=0.5.2,<1",
    "pydantic>=2.10.6,<3",
    "click>=8.2.1,<9",
    "tqdm>=4.67.1,<5",
    "immutables>=0.21,<1",
    "scipy",
    "numpy",
    "sentencepiece",
    "protobuf",
    "jinja2",
]


def cache_folder() -> Path:
    """Where peers' environments live: $MERGEKIT_LR_PEER_DIR, or ``mergekit_lr/peers`` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "mergekit_lr" / "peers"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``: two test runs must not build one environment at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _pip(python: Path, *arguments: str) -> None:
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"pip install {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def ensure() -> Path:
    """Make the environment unless a finished one of this very recipe exists; return its ``bin`` folder.

    A build takes one to three minutes and about 1.5 GB of disk. The marker is written last, so an interrupted
    build is begun again, and a changed requirement list rebuilds.
    """
    home = cache_folder() / "mergekit-0.1.5"
    marker = home / "finished.json"
    recipe = json.dumps({"python": sys.version, "torch": TORCH, "peer": PEER, "needs": NEEDS}, indent=1)
    with _locked(cache_folder() / "mergekit-0.1.5.lock"):
        if not marker.is_file() or marker.read_text() != recipe:
            marker.unlink(missing_ok=True)
            venv.create(home, with_pip=True, clear=True)
            python = home / "bin" / "python"
            _pip(python, *TORCH)
            _pip(python, "--no-deps", *PEER)
            _pip(python, *TORCH, *NEEDS)
            marker.write_text(recipe)
    return home / "bin"


def quiet_environment() -> dict[str, str]:
    """Environment variables for running mergekit: offline, and nothing of the calling virtual environment."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


if __name__ == "__main__":
    print(ensure())
