"""The one line that each row of SECURITY.md's table ends with: what, where, why, what to do.

``python tests/attacks/messages.py`` writes them to ``messages.txt``, which a test compares with what is said today.
"""

from __future__ import annotations

import errno
import json
import re
import tempfile
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from attack_configs import MIXTURE, mixture
from attack_pickles import archive, zip_of
from attack_values import one_tensor
from staging import CONFIG, LLAMA, header, merged, model, recipe, safetensors

import mergekit_lr
from mergekit_lr import registry
from mergekit_lr.checkpoint import fs
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import open_file
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.pickle import check_archive
from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.engine.parts import parse_part
from mergekit_lr.engine.workspace import Workspace
from mergekit_lr.errors import MergekitLrError
from mergekit_lr.recipe import load_recipe

PAGE = Path(__file__).parent / "messages.txt"
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
Row = Callable[[Path], object]
SAID: dict[int, Row] = {}


def row(number: int) -> Callable[[Row], Row]:
    def declare(body: Row) -> Row:
        SAID[number] = body
        return body

    return declare


def read(room: Path, data: bytes) -> object:
    (room / "model.safetensors").write_bytes(data)
    return read_header(room / "model.safetensors")


@row(1)
def pickled(room: Path) -> object:
    archive(room / "pytorch_model.bin", b"cos\nsystem\n(Vtouch canary\ntR.")
    return open_model(ModelReference(Place(str(room))))


@row(2)
def bomb(room: Path) -> object:
    zip_of(("m/data.pkl", b"x", 0), ("m/data/0", bytes(1 << 20), 8))(room / "model.bin")
    return check_archive(room / "model.bin")


@row(3)
def overlap(room: Path) -> object:
    return read(room, header({"a": ENTRY, "b": ENTRY}, bytes(4)))


@row(4)
def long_header(room: Path) -> object:
    return read(room, b"\xff" * 8 + b"{}")


@row(5)
def same_name(room: Path) -> object:
    one = json.dumps(ENTRY).encode()
    return read(room, header({}, bytes(4), raw=b'{"a":' + one + b',"a":' + one + b"}"))


@row(6)
def packed(room: Path) -> object:
    return read(room, header({"a": {**ENTRY, "dtype": "F4", "shape": [8]}}, bytes(4)))


@row(7)
def traversal(room: Path) -> object:
    folder = model(room / "m")
    index = {"weight_map": {"lm_head.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return merged(folder, out=room / "out")


@row(8)
def stray(room: Path) -> object:
    for name in ("a", "b"):
        (room / f"{name}.safetensors").write_bytes(safetensors({"w": (2,)}))
    return merged(room, out=room / "out")


@row(9)
def truncated(room: Path) -> object:
    path = room / "model.safetensors"
    path.write_bytes(safetensors({"w": (20_000,)}))
    with open_file(path, "m") as checkpoint:
        with path.open("r+b") as f:
            f.truncate(1000)
        return checkpoint.read("w", 0, 20_000)


@row(10)
def damaged(room: Path) -> object:
    return read(room, header({"a": ENTRY}, bytes(3)))


@row(11)
def poisoned(room: Path) -> object:
    return merged(one_tensor(room / "m", "F32", 4, [0x3F800000, 0x7FC00000]), out=room / "out")


@row(12)
def overflowing(room: Path) -> object:
    return merged(one_tensor(room / "m", "F32", 4, [0x49742400]), out=room / "out", out_dtype="float16")


def failing(room: Path, code: int) -> object:
    """A merge whose first write of a shard's bytes fails."""
    with fs.explained("write", room / "out.partial" / "model" / "model.safetensors"):
        raise OSError(code, {errno.ENOSPC: "No space left on device"}[code])


@row(13)
def full(room: Path) -> object:
    return failing(room, errno.ENOSPC)


def interrupted(room: Path) -> Path:
    """A merge that was stopped half-way."""
    folder = model(room / "m")

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    try:
        mergekit_lr.merge(recipe(folder), room / "out", device="cpu", threads=1, progress=stop)
    except KeyboardInterrupt:
        return folder
    raise AssertionError("it was not stopped")


@row(14)
def in_pieces(room: Path) -> object:
    interrupted(room)
    return mergekit_lr.inspect(str(room / "out"))


@row(15)
def other_recipe(room: Path) -> object:
    return merged(interrupted(room), out=room / "out", out_dtype="float16")


@row(16)
def no_parent(room: Path) -> object:
    return merged(model(room / "m"), out=room / "none" / "out")


@row(17)
def two_runs(room: Path) -> object:
    folder, space = model(room / "m"), Workspace(room / "out")
    space.reserve(resume=True, overwrite=False)
    try:
        return merged(folder, out=room / "out")
    finally:
        space.release()


@row(18)
def onto_itself(room: Path) -> object:
    folder = model(room / "m")
    return mergekit_lr.merge(recipe(folder), folder, device="cpu", threads=1, overwrite=True)


@row(19)
def unreadable(room: Path) -> object:
    folder = model(room / "m")
    (folder / "model.safetensors").chmod(0o600)
    (folder / "config.json").chmod(0o644)
    [line] = mergekit_lr.verify(folder).warnings
    return line


@row(20)
def aliases(room: Path) -> object:
    lines = ["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))]
    return load_recipe("\n".join(lines) + "\n")


@row(21)
def misspelt(room: Path) -> object:
    return load_recipe("merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]\n")


@row(22)
def kernels(room: Path) -> object:
    from mergekit_lr.evaluation import load_for_evaluation

    return load_for_evaluation(model(room / "m", config={**CONFIG, "attn_implementation": "evil/kernels"}))


@row(23)
def huge(room: Path) -> object:
    folder = model(room / "m")
    with (folder / "config.json").open("wb") as f:
        f.truncate(10 << 30)
    return merged(folder, out=room / "out")


@row(24)
def vocabulary(room: Path) -> object:
    return merged(model(room / "m", config={**CONFIG, "vocab_size": 17}), out=room / "out")


@row(25)
def experts(room: Path) -> object:
    return merged(mixture(room / "m", num_experts=8), out=room / "out")


@row(26)
def fused(room: Path) -> object:
    one = {f"model.layers.{i}.mlp.experts.gate_up_proj": (4, 8, 12) for i in range(2)}
    other = {n: s for n, s in MIXTURE.items() if ".experts." not in n} | one
    return merged(mixture(room / "a"), mixture(room / "b", other), out=room / "out")


@row(27)
def untied(room: Path) -> object:
    tied = {n: s for n, s in LLAMA.items() if n != "lm_head.weight"}
    base = model(room / "base", config={**CONFIG, "tie_word_embeddings": True}, tensors=tied)
    other = model(room / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] = 0x40
    (other / "model.safetensors").write_bytes(bytes(data))
    models = [{"model": str(m), "parameters": {"weight": 1}} for m in (base, other)]
    given = {"merge_method": "linear", "base_model": str(base), "models": models, "dtype": "float32"}
    return mergekit_lr.merge(given, room / "out", device="cpu", threads=1)


@row(28)
def tokenizers(room: Path) -> object:
    folders = [model(room / n) for n in "ab"]
    for folder, ids in zip(folders, ({"x": 0, "y": 1}, {"x": 1, "y": 0}), strict=True):
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": ids, "merges": []}}))
    return merged(*folders, out=room / "out")


@row(29)
def missing(room: Path) -> object:
    lacking = {n: s for n, s in LLAMA.items() if n != "model.layers.1.mlp.up_proj.weight"}
    return merged(model(room / "a"), model(room / "b", tensors=lacking), out=room / "out")


@row(30)
def too_large(room: Path) -> object:
    folders = [model(room / n) for n in "abc"]
    given = {
        "merge_method": "model_stock",
        "base_model": str(folders[0]),
        "models": [{"model": str(f)} for f in folders[1:]],
    }
    return mergekit_lr.merge(given, room / "out", device="cpu", threads=1, max_memory=64)


@row(31)
def other_bytes(room: Path) -> object:
    folder = one_tensor(room / "m", "F32", 4, [0x3F800000] * 8)
    merged(folder, out=room / "out")
    path = room / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(bytes(data))
    [line] = mergekit_lr.verify(room / "out").problems
    return line


@row(32)
def offline(room: Path) -> object:
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        return open_model(ModelReference(Place("evil/model")), cache=room / "cache")
    finally:
        constants.HF_HUB_OFFLINE = before


@row(33)
def terminal(room: Path) -> object:
    return read(room, header({"\x1b[2Jnothing to see": ENTRY}, bytes(4)))


@row(34)
def broken_plugin(room: Path) -> object:
    before = registry.entry_points
    registry.entry_points = lambda **_: [EntryPoint("evil", "no_such_module:X", registry.GROUP)]  # type: ignore
    try:
        return load_recipe("merge_method: evil\nmodels: [{model: a}]\n")
    finally:
        registry.entry_points = before  # type: ignore[attr-defined]
        registry.plugin_method.cache_clear()


@row(35)
def no_such_part(room: Path) -> object:
    return parse_part("5/4")


def line_of(number: int, room: Path) -> str:
    """What row ``number`` says, with the room's path, numbers of processes and times left out."""
    try:
        said = SAID[number](room)
    except MergekitLrError as e:
        said = str(e)
    assert isinstance(said, str), f"row {number}: nothing was refused"
    said = said.replace(str(room), "").replace(str(room.resolve()), "")
    return re.sub(r"\(process \d+ on [^)]+\)", "(process N on HOST)", said)


def page() -> str:
    """Every row's line."""
    lines = []
    for number in sorted(SAID):
        with tempfile.TemporaryDirectory() as room:
            lines.append(f"{number:>2}  {line_of(number, Path(room))}\n")
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
