"""Watches a whole test session: no code of a model folder is compiled, run or imported, and nothing leaves the machine.

An audit hook sees every ``exec``, ``compile`` and ``import`` of this process and of its forked workers, and every
connection. What is wrong is written to a file, because the hook of a worker cannot fail the session itself.
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OWN_CODE = ("tests", "mergekit_lr", "methods", "benchmarks", "examples/zoo/", "examples/quickstart.py")
MODEL_FILES = ("config.json", "adapter_config.json", "bundle.json", "tokenizer_config.json")
ALLOWED = (ROOT / "mergekit_lr" / "experts" / "modeling_tied_experts.py").read_bytes()
"""The one module that this package writes into outputs: a test loads it, as users who ask for it do."""


@lru_cache(4096)
def in_model_folder(path: str) -> bool:
    """Whether a file of code lies in a folder that holds a model, or in transformers' cache of such code."""
    if "transformers_modules" in path:
        return not _is_ours(path)
    place = Path(path)
    if not place.is_absolute() or place.suffix not in (".py", ".pyc", ".so", ".pkl"):
        return False
    if place.is_relative_to(ROOT) and str(place.relative_to(ROOT)).startswith(OWN_CODE):
        return "examples/zoo/build/" in path and not _is_ours(path)
    folder = place.parent
    found = any((folder / n).exists() for n in MODEL_FILES) or next(folder.glob("*.safetensors"), None)
    return bool(found) and not _is_ours(path)


def _is_ours(path: str) -> bool:
    try:
        return Path(path).name == "__init__.py" or Path(path).read_bytes() == ALLOWED
    except OSError:
        return False


def foreign_address(address: Any) -> bool:
    """Whether a socket address is another machine's. Unix sockets and the loopback are not."""
    if not isinstance(address, tuple) or not address:
        return False
    host = str(address[0])
    return not (host in ("", "localhost", "::1", "0.0.0.0", "::") or host.startswith(("127.", "::ffff:127.")))


def watch(log: Path) -> None:
    """Install the hook; what it finds is appended to ``log``. There is no way to take an audit hook out again."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(text: str) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        os.write(descriptor, f"{text} ({test})\n".encode("utf-8", "backslashreplace"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            if in_model_folder(name):
                note(f"ran {name}")
        elif event == "compile":
            if isinstance(arguments[1], str) and in_model_folder(arguments[1]):
                note(f"compiled {arguments[1]}")
        elif event == "import":
            if isinstance(arguments[1], str) and in_model_folder(arguments[1]):
                note(f"imported {arguments[1]}")
        elif event == "socket.connect" and foreign_address(arguments[1]):
            note(f"connected to {arguments[1]}")

    sys.addaudithook(hook)
