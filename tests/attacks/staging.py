"""What the attack files of this folder share: how an attack is declared, small models, and what must come back.

An attack is a function on an empty folder. It builds a hostile input there, tries it, and returns what happened, in
one line. If the input gets through, it raises AssertionError. ``python tests/attacks/NAME.py`` runs those of a file.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.errors import MergekitLrError

Body = Callable[[Path], str]


@dataclass(frozen=True)
class Attack:
    """``row``: of the table in SECURITY.md; ``tries``: what the input is meant to achieve."""

    row: int
    name: str
    tries: str
    body: Body


ATTACKS: list[Attack] = []


def attack(row: int) -> Callable[[Body], Body]:
    """Declare an attack; its docstring says what it tries."""

    def declare(body: Body) -> Body:
        module = Path(body.__code__.co_filename).stem
        ATTACKS.append(Attack(row, f"{module}.{body.__name__}", (body.__doc__ or "").split("\n")[0], body))
        return body

    return declare


def main(module: str) -> None:
    """Run the attacks of the file that is run as a script, and print what happened to each."""
    if module != "__main__":
        return
    through = 0
    for one in ATTACKS:
        with tempfile.TemporaryDirectory() as room:
            try:
                outcome = one.body(Path(room))
            except AssertionError as e:
                through += 1
                outcome = f"GOT THROUGH: {e}"
        print(f"row {one.row:<2}  {one.tries}\n        {outcome.replace(room, '')}")
    print(f"{len(ATTACKS) - through} of {len(ATTACKS)} attacks failed")
    sys.exit(through > 0)


def refused(call: Callable[[], object], match: str = "", *, kind: type[MergekitLrError] = MergekitLrError) -> str:
    """The one line with which ``call`` is refused; AssertionError if it is not, or not in the right way."""
    try:
        call()
    except kind as e:
        line = str(e)
    else:
        raise AssertionError("it was accepted")
    assert "\n" not in line and line.isprintable() and len(line) < 2000, line
    assert re.search(match, line), f"{match!r} is not in {line!r}"
    return line


_watched: list[tuple[str, str]] | None = None
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None or not event.startswith(("open", "socket.", "subprocess.", "os.system", "os.exec", "shutil.")):
        return
    _watched.append((event, str(arguments[0]) if arguments else ""))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Audit events of opening files, sockets and programs inside the block: (event, first argument)."""
    global _watched, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _watched = seen = []
    try:
        yield seen
    finally:
        _watched = None


def header(entries: Mapping[str, Any], data: bytes = b"", raw: bytes | None = None) -> bytes:
    """A safetensors file with this header, sound or not."""
    text = json.dumps(entries).encode() if raw is None else raw
    return struct.pack("<Q", len(text)) + text + data


def safetensors(tensors: Mapping[str, tuple[int, ...]], fill: bytes = b"\0\0\x80\x3f") -> bytes:
    """A sound file of fp32 tensors of these shapes, all of one value (1.0)."""
    entries, at = {}, 0
    for name, shape in tensors.items():
        size = 4
        for d in shape:
            size *= d
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header(entries, fill * (at // 4))


LLAMA = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.layers.1.mlp.up_proj.weight": (12, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}


def model(folder: Path, config: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None) -> Path:
    """A small sound model folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "model.safetensors").write_bytes(safetensors(LLAMA if tensors is None else tensors))
    return folder


def recipe(*folders: Path | str, **more: Any) -> dict[str, Any]:
    """A plain average of models."""
    models = [{"model": str(f), "parameters": {"weight": 1.0}} for f in folders]
    return {"merge_method": "linear", "models": models, "dtype": "float32", **more}


def merged(*folders: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Merge models into ``out``; the report."""
    import mergekit_lr

    return mergekit_lr.merge(recipe(*folders, **more), out, device="cpu", threads=1).report
