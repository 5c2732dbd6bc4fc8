"""Inputs that are cut short, grown, replaced, damaged or changed, before a run, during it and between two."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lr import calibrate, merge, verify
from mergekit_lr.checkpoint import fs
from mergekit_lr.errors import CheckpointError, MergekitLrError, UsageError

from .jobs import mixture, ties

LARGE = 200_000


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "inputs"
    folder.mkdir()
    return ties(folder)


def weights(tmp_path: Path, model: int = 1) -> Path:
    return tmp_path / "inputs" / f"m{model}" / "model.safetensors"


def no_output(tmp_path: Path) -> bool:
    return not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", range(4))
def test_cut_short_anywhere_before_a_run(part: int, recipe: dict[str, Any], tmp_path: Path) -> None:
    """200 places, fifty for each part of the test; those in the header and its length among them."""
    path = weights(tmp_path)
    data = path.read_bytes()
    random = Random(part)
    cuts = [0, 1, 7, 8, 9, len(data) - 1][part::4]
    cuts += [random.randrange(len(data)) for _ in range(50 - len(cuts))]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError) as caught:
            merge(recipe, tmp_path / "out", device="cpu")
        assert str(path) in str(caught.value) and caught.value.exit_code == 4
    assert no_output(tmp_path) and not (tmp_path / "out.partial").exists()


def during(recipe: dict[str, Any], out: Path, change: Callable[[], None], at: int = 1) -> None:
    """Merge; change something when weights are read for the ``at``-th time."""
    count = 0

    def hook(operation: str, path: str) -> None:
        nonlocal count
        if operation == "read" and path.endswith(".safetensors") and (out.parent / "out.partial" / "journal").exists():
            count += 1
            if count == at:
                fs.set_read_hook(None)
                change()

    def began(operation: str, path: str) -> None:
        if operation == "pwrite" and path.endswith(".safetensors"):  # the headers are there: data comes next
            (out.parent / "out.partial" / "journal").touch()

    fs.set_read_hook(hook)
    fs.set_hook(began)
    try:
        merge(recipe, out, device="cpu", threads=1, shard_size=25_000)
    finally:
        fs.set_read_hook(None)
        fs.set_hook(None)


@pytest.mark.parametrize("cut", [0, 9, 700, 12_000, 30_000])
def test_cut_short_during_a_run(cut: int, recipe: dict[str, Any], tmp_path: Path) -> None:
    """An error, in this very process: with a mapped file it would be a SIGBUS."""
    with pytest.raises(CheckpointError, match=r"ended inside|changed during the run"):
        during(recipe, tmp_path / "out", lambda: os.truncate(weights(tmp_path), cut))
    assert no_output(tmp_path)


def grow(path: Path) -> None:
    with path.open("ab") as f:
        f.write(b"more")


def replace(path: Path) -> None:
    """Another file of the same size and time."""
    times = path.stat()
    tensors = {n: t + 1 for n, t in load_file(path).items()}
    save_file(tensors, path.with_suffix(".new"), {"format": "pt"})
    assert path.with_suffix(".new").stat().st_size == times.st_size
    os.utime(path.with_suffix(".new"), ns=(times.st_atime_ns, times.st_mtime_ns))
    path.with_suffix(".new").replace(path)


def flip(path: Path, at: int, *, keep_time: bool) -> None:
    times = path.stat()
    with path.open("r+b") as f:
        f.seek(at)
        [byte] = f.read(1)
        f.seek(at)
        f.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


DURING: dict[str, Callable[[Path], None]] = {
    "grown": grow,
    "replaced": replace,
    "removed": Path.unlink,
    "a bit of its data flipped": lambda p: flip(p, 20_000, keep_time=False),
    "a bit of its header flipped": lambda p: flip(p, 30, keep_time=False),
    "a bit of its header flipped, its time set back": lambda p: flip(p, 30, keep_time=True),
    "touched": lambda p: os.utime(p, ns=(1, 1)),
    "a folder in its place": lambda p: (p.unlink(), p.mkdir())[0],
    "a link in its place": lambda p: (p.rename(p.with_suffix(".x")), p.symlink_to("model.x"))[0],
}


@pytest.mark.parametrize("change", DURING)
@pytest.mark.parametrize("at", [1, 5])
def test_changed_during_a_run(change: str, at: int, recipe: dict[str, Any], tmp_path: Path) -> None:
    if change == "a link in its place":  # it is the same file: nothing of what was read has changed
        during(recipe, tmp_path / "out", lambda: DURING[change](weights(tmp_path)), at)
        assert not verify(tmp_path / "out").problems
        return
    with pytest.raises(CheckpointError, match=r"an input changed during the run|cannot (open|read)"):
        during(recipe, tmp_path / "out", lambda: DURING[change](weights(tmp_path)), at)
    assert no_output(tmp_path)


def test_a_base_that_changes_is_seen_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="an input changed during the run"):
        during(recipe, tmp_path / "out", lambda: grow(weights(tmp_path, 0)), 2)


@pytest.mark.parametrize("bits", [range(0, 120, 3)])
def test_flipped_bits_of_a_header_are_an_error_or_make_no_difference(
    bits: range, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Before a run: never anything but an error of the family, or an output that verifies."""
    path = weights(tmp_path)
    data = path.read_bytes()
    ended = {"error": 0, "merged": 0}
    for at in bits:
        path.write_bytes(data)
        flip(path, at, keep_time=False)
        try:
            merge(recipe, tmp_path / f"out{at}", device="cpu")
        except MergekitLrError as e:
            assert e.exit_code == 4, e
            ended["error"] += 1
        else:
            assert not verify(tmp_path / f"out{at}").problems
            ended["merged"] += 1
    assert ended["error"] > 20, ended


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_every_read_can_fail(code: int, recipe: dict[str, Any], tmp_path: Path) -> None:
    total = 0

    def count(operation: str, path: str) -> None:
        nonlocal total
        total += 1

    def run_with(hook: Callable[[str, str], None], out: Path) -> None:
        fs.set_read_hook(hook)
        try:
            merge(recipe, out, device="cpu", threads=1)
        finally:
            fs.set_read_hook(None)

    run_with(count, tmp_path / "whole")
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert total > 30
    for k in range(1, total + 1, 2 if code == errno.EIO else 7):
        left = [k]

        def fail(operation: str, path: str, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(code, os.strerror(code))

        with pytest.raises(CheckpointError) as caught:
            run_with(fail, tmp_path / f"out{k}")
        assert os.strerror(code) in str(caught.value) and caught.value.where, k
        assert not (tmp_path / f"out{k}").exists()
        if k % 5 == 0:
            merge(recipe, tmp_path / f"out{k}", device="cpu", threads=1)
            assert (tmp_path / f"out{k}" / "model.safetensors").read_bytes() == wanted


def interrupted(recipe: dict[str, Any], out: Path, **options: Any) -> None:
    """A run that stops when its first unit is done."""

    def stop(operation: str, path: str) -> None:
        if operation == "append":
            fs.set_hook(None)
            raise KeyboardInterrupt

    fs.set_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, out, device="cpu", threads=1, **options)
    finally:
        fs.set_hook(None)


def rewrite(path: Path, edit: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def set_in(recipe: dict[str, Any], model: int, **parameters: Any) -> None:
    recipe["models"][model]["parameters"] |= parameters


def tensors_of(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


Mutation = Callable[[dict[str, Any], Path], Any]
MUTATIONS: dict[str, Mutation] = {
    "a weight": lambda r, t: set_in(r, 0, weight=0.25),
    "the last weight": lambda r, t: set_in(r, 1, weight=0.5000001),
    "a density": lambda r, t: set_in(r, 0, density=0.5),
    "a gradient": lambda r, t: set_in(r, 0, weight=[0.4, 0.6]),
    "a filter": lambda r, t: set_in(r, 0, weight=[{"filter": "a", "value": 0.5}, {"value": 0.4}]),
    "the method": lambda r, t: r.update(merge_method="dare_ties"),
    "the order": lambda r, t: r["models"].reverse(),
    "a model less": lambda r, t: r["models"].pop(),
    "a model more": lambda r, t: r["models"].append(
        dict(r["models"][0], model=str(shutil.copytree(t / "inputs" / "m1", t / "inputs" / "m3")))
    ),
    "the dtype": lambda r, t: r.update(dtype="float32"),
    "the dtype on disk": lambda r, t: r.update(out_dtype="float16"),
    "the seed": lambda r, t: r.update(seed=1),
    "nonfinite": lambda r, t: r.update(nonfinite="allow"),
    "a parameter of the merge": lambda r, t: r.update(parameters={"normalize": False}),
    "the other way round": lambda r, t: r.update(base_model=r["models"][0]["model"]),
    "the time of an input": lambda r, t: os.utime(weights(t), ns=(1, 1)),
    "the time of the base": lambda r, t: os.utime(weights(t, 0), ns=(1, 1)),
    "numbers of an input": lambda r, t: tensors_of(weights(t), lambda x: x["c.weight"].add_(1)),
    "numbers of the last input": lambda r, t: tensors_of(weights(t, 2), lambda x: x["a.weight"].mul_(2)),
    "a shape in all": lambda r, t: [
        tensors_of(weights(t, i), lambda x: x.update({"c.weight": x["c.weight"][:200].clone()})) for i in range(3)
    ],
    "a name in all": lambda r, t: [
        tensors_of(weights(t, i), lambda x: x.update({"d.weight": x.pop("c.weight")})) for i in range(3)
    ],
    "a tensor more in all": lambda r, t: [
        tensors_of(weights(t, i), lambda x: x.update(extra=torch.zeros(3))) for i in range(3)
    ],
    "metadata of an input": lambda r, t: save_file(load_file(weights(t)), weights(t), {"format": "pt", "note": "x"}),
    "an input by another": lambda r, t: shutil.copytree(
        t / "inputs" / "m0", t / "inputs" / "m1", dirs_exist_ok=True, copy_function=shutil.copyfile
    ),
    "the config of the base": lambda r, t: rewrite(t / "inputs" / "m0" / "config.json", lambda c: c | {"eos": 3}),
    "the config of an input": lambda r, t: rewrite(t / "inputs" / "m1" / "config.json", lambda c: c | {"eos": 3}),
    "special tokens": lambda r, t: (t / "inputs" / "m0" / "special_tokens_map.json").write_text("{}"),
    "generation settings": lambda r, t: (t / "inputs" / "m0" / "generation_config.json").write_text("{}"),
    "a chat template": lambda r, t: (t / "inputs" / "m0" / "chat_template.jinja").write_text("{{ x }}"),
    "another place of an input": lambda r, t: r["models"][0].update(
        model=str(shutil.copytree(t / "inputs" / "m1", t / "inputs" / "elsewhere"))
    ),
    "the size of the shards": lambda r, t: {"shard_size": 30_000},
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_run_is_not_gone_on_with_after_a_change(mutation: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    out, options = tmp_path / "out", {"shard_size": 25_000}
    interrupted(recipe, out, **options)
    found = MUTATIONS[mutation](recipe, tmp_path)
    if isinstance(found, dict) and "shard_size" in found:
        options = found
    with pytest.raises(UsageError, match=r"unfinished work.*changed since: .*--restart"):
        merge(recipe, out, device="cpu", **options)
    assert no_output(tmp_path)
    merge(recipe, out, device="cpu", resume=False, **options)
    merge(recipe, tmp_path / "afresh", device="cpu", **options)
    assert not verify(out).problems
    for path in sorted(out.glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "afresh" / path.name).read_bytes()


def test_there_are_thirty() -> None:
    assert len(MUTATIONS) >= 30


@pytest.mark.parametrize("what", ["nothing", "the text", "the tokenizer", "the config"])
def test_what_was_prepared_is_used_only_for_what_it_was_prepared_from(what: str, tmp_path: Path) -> None:
    """Calibration is kept between runs; it must not outlive the text, or the tokenizer that cut it."""
    model = mixture(tmp_path, "mixtral")
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 60)
    recipe = {
        "merge_method": "reap",
        "models": [{"model": str(model)}],
        "parameters": {"num_experts": 4},
        "calibration": {"text": [str(text)], "samples": 2, "sequence_length": 16},
    }

    def stop(operation: str, path: str) -> None:
        if operation == "append":
            raise KeyboardInterrupt

    fs.set_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, tmp_path / "out", device="cpu", threads=1)
    finally:
        fs.set_hook(None)
    if what == "nothing":
        merge(recipe, tmp_path / "out", device="cpu", threads=1)
        return
    if what == "the text":
        text.write_text(text.read_text().replace("two", "deux"))
    elif what == "the tokenizer":
        rewrite(model / "tokenizer_config.json", lambda c: c | {"note": "x"})
    else:
        rewrite(model / "config.json", lambda c: c | {"num_experts_per_tok": 1})
    with pytest.raises(UsageError, match=r"unfinished work.*changed since: files"):
        merge(recipe, tmp_path / "out", device="cpu", threads=1)


def test_a_calibration_keeps_away_from_its_model(tmp_path: Path) -> None:
    model = mixture(tmp_path, "mixtral")
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 60)
    before = (model / "model.safetensors").read_bytes()
    for out in (model / "model.safetensors", model / ".." / model.name / "model.safetensors"):
        with pytest.raises(UsageError, match="one of the inputs"):
            calibrate(model, out, [text], samples=2, sequence_length=16, device="cpu", overwrite=True)
    assert (model / "model.safetensors").read_bytes() == before
