"""Names in a stranger's files that lead out of the folder they are in (row 7)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from staging import CONFIG, LLAMA, attack, main, merged, model, refused, safetensors, watched

import mergekit_lr
from mergekit_lr.checkpoint.open import open_model
from mergekit_lr.checkpoint.pickle import weight_files
from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.errors import CheckpointError, MergekitLrError

SECRET = "secret.safetensors"


def names(room: Path) -> list[str]:
    """Sixty ways to write a file outside of ``room/model``; most lead to ``room/secret.safetensors``."""
    there = str(room / SECRET)
    ways = [
        there, f"../{SECRET}", f"./../{SECRET}", f"x/../../{SECRET}", f"..//{SECRET}", f".//../{SECRET}",
        f"..\\{SECRET}", f"\\..\\{SECRET}", f"{there}/", f"/{there}", f"//{there}", f"file://{there}",
        f"file:{there}", f"http://localhost/{SECRET}", f"https://x/../{SECRET}", f"//host/share/{SECRET}",
        f"\\\\host\\share\\{SECRET}", f"C:\\{SECRET}", f"C:{SECRET}", f"C:/{SECRET}", f"~/{SECRET}", f"~root/{SECRET}",
        f"$HOME/{SECRET}", f"${{HOME}}/{SECRET}", f"%HOME%\\{SECRET}", f"%2e%2e/{SECRET}", f"%2e%2e%2f{SECRET}",
        f"..%2f{SECRET}", f"..%5c{SECRET}", f"%c0%ae%c0%ae/{SECRET}", f"..%c0%af{SECRET}", f"..;/{SECRET}",
        f"\u2025/{SECRET}", f"\uff0e\uff0e\uff0f{SECRET}", f"..\u2215{SECRET}", f"..\u2044{SECRET}",
        f"../{SECRET}\0", f"../{SECRET}\0.safetensors", f"\0../{SECRET}", f"../{SECRET}\n", f"\n../{SECRET}",
        f" ../{SECRET}", f"../{SECRET} ", f"../{SECRET}.", f"../{SECRET}::$DATA", f"..\t/{SECRET}",
        f"a/b/c/../../../../{SECRET}", f"model/../../{SECRET}", f"../model/../{SECRET}", f"|cat {there}",
        f"`cat {there}`.safetensors", f"$(cat {there}).safetensors", f"*/{SECRET}", f"../*{SECRET}", f"?/{SECRET}",
        f"/proc/self/root{there}", f"/proc/self/cwd/../{SECRET}", f"/dev/fd/../../{there}", "..", "/",
    ]  # fmt: skip
    assert len(ways) >= 60 and len(set(ways)) == len(ways)
    return ways


def nothing_outside(seen: list[tuple[str, str]], room: Path, inside: Path) -> None:
    for event, what in seen:
        if event == "open" and (SECRET in what or (str(room) in what and str(inside) not in what)):
            raise AssertionError(f"it opened {what}")
        assert not event.startswith(("socket.connect", "subprocess", "os.system")), (event, what)


def try_all(room: Path, folder: Path, write: Callable[[str], object], read: Callable[[], object]) -> str:
    """Write each name where an attacker would, read as a user would: always refused, nothing outside opened."""
    (room / SECRET).write_bytes(safetensors(LLAMA))
    line = ""
    for name in names(room):
        write(name)
        with watched() as seen:
            line = refused(read, kind=CheckpointError)
        nothing_outside(seen, room, folder)
    return f"{len(names(room))} names refused, 0 opens outside; such as {line[-150:]}"


def opened(folder: Path) -> Callable[[], object]:
    def read() -> object:
        with open_model(ModelReference(Place(str(folder)))) as checkpoint:
            return [checkpoint.read(n, 0, 1) for n in checkpoint.tensors]

    return read


@attack(7)
def weight_map(room: Path) -> str:
    """the index of a sharded model places a tensor in a file elsewhere"""
    folder = model(room / "model")
    index = folder / "model.safetensors.index.json"
    return try_all(
        room, folder, lambda n: index.write_text(json.dumps({"weight_map": {"lm_head.weight": n}})), opened(folder)
    )


@attack(7)
def pickled_weight_map(room: Path) -> str:
    """the same in the index of a pickled model"""
    folder = room / "model"
    folder.mkdir()
    index = folder / "pytorch_model.bin.index.json"
    return try_all(
        room,
        folder,
        lambda n: index.write_text(json.dumps({"weight_map": {"a": n.replace(".safetensors", ".bin")}})),
        lambda: weight_files(folder),
    )


@attack(7)
def bundle(room: Path) -> str:
    """bundle.json names a shard elsewhere"""
    folder = room / "model"
    folder.mkdir()
    manifest = {
        "format": "mergekit_lr bundle", "version": 1, "method": "tall_masks", "tasks": [{"name": "t", "model": "m"}],
        "parameters": {}, "base": {}, "tensors": [], "digest_algorithm": "", "digests": {},
    }  # fmt: skip

    def write(name: str) -> None:
        files = [{"file": name, "bytes": 1, "header_sha256": ""}]
        (folder / "bundle.json").write_text(json.dumps({**manifest, "files": files}))

    return try_all(room, folder, write, lambda: mergekit_lr.open_bundle(folder))


class _Info:
    """Pickles as the storage information of torch.distributed.checkpoint."""


@attack(7)
def optimizer_folder(room: Path) -> str:
    """the metadata of a distributed optimizer state name a file elsewhere"""
    from mergekit_lr.curvatures.distributed import Chunk, _load

    folder = room / "model"
    folder.mkdir()
    chunk: list[Chunk] = []

    def write(name: str) -> None:
        chunk[:] = [Chunk((0,), (1,), name, 0, 8)]

    def read() -> None:
        _load(folder, chunk[0])

    return try_all(room, folder, write, read)


LINKED = [
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json", "chat_template.jinja", "tokenizer.model", "README.md", "vocab.json",
]  # fmt: skip


@attack(7)
def links(room: Path) -> str:
    """each file of a model is a link to a file, a folder or a device elsewhere, or to itself"""
    (room / SECRET).write_bytes(safetensors(LLAMA))
    (room / "secret").mkdir()
    (room / "secret" / SECRET).write_text('{"secret": 1}')
    base = model(room / "base")
    targets = [room / SECRET, Path("..") / SECRET, room / "secret", room / "secret" / SECRET, Path("/dev/zero"),
               Path("/dev/stdin"), Path("/proc/self/environ"), None]  # fmt: skip
    tried = 0
    for number, name in enumerate(LINKED):
        for which, target in enumerate(targets):
            folder = model(room / f"model-{number}-{which}")
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(folder / name if target is None else target)
            out = room / f"out-{number}-{which}"
            with watched() as seen:
                try:
                    merged(folder, base, out=out)
                except MergekitLrError as e:
                    assert isinstance(e, CheckpointError), e
            for event, what in seen:
                assert event != "open" or (SECRET not in what and what not in ("/dev/zero", "/dev/stdin")), what
                assert event != "open" or not what.endswith("/environ"), what
            assert not out.exists() or not (out / name).is_symlink()
            assert not any(b"secret" in p.read_bytes() for p in out.glob("*.jinja"))
            tried += 1
    return f"{tried} links: refused or left out of the output, 0 opens outside"


@attack(7)
def adapter_links(room: Path) -> str:
    """the files of a LoRA adapter are links elsewhere"""
    base = model(room / "base")
    (room / SECRET).write_bytes(safetensors({"base_model.model.model.norm.lora_A.weight": (1, 8)}))
    (room / "secret.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    line = ""
    for name, target in (("adapter_config.json", "secret.json"), ("adapter_model.safetensors", SECRET)):
        folder = room / f"adapter-{target}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
        (folder / "adapter_model.safetensors").write_bytes(safetensors({"x": (1,)}))
        (folder / name).unlink()
        (folder / name).symlink_to(room / target)
        with watched() as seen:
            line = refused(
                lambda folder=folder: open_model(ModelReference(Place(str(base)), Place(str(folder)))),
                "leaves the model folder",
                kind=CheckpointError,
            )
        assert not any(event == "open" and "secret" in Path(what).name for event, what in seen)
    return line


@attack(7)
def evaluated(room: Path) -> str:
    """a folder is evaluated by transformers, which would follow its index and its links"""
    from mergekit_lr.evaluation import load_for_evaluation

    (room / SECRET).write_bytes(safetensors(LLAMA))
    folder = model(room / "model", config={**CONFIG, "num_hidden_layers": 2})
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(LLAMA, f"../{SECRET}")}))
    with watched() as seen:
        refused(lambda: load_for_evaluation(folder), "plain .safetensors file name", kind=CheckpointError)
        index.unlink()
        (folder / "model.safetensors").symlink_to(room / SECRET)
        line = refused(lambda: load_for_evaluation(folder), "leaves the model folder", kind=CheckpointError)
    assert not any(event == "open" and what.endswith(SECRET) for event, what in seen)
    return line


main(__name__)
