"""What lies beside the weights: code, templates, pickled tokenizers, huge files, pipes (rows 22, 23)."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from staging import CONFIG, attack, main, merged, model, refused, watched

from mergekit_lr.checkpoint.foreign_code import references
from mergekit_lr.errors import CheckpointError

EVIL = "open({canary!r}, 'w')\nclass Evil: pass\n"


def with_code(room: Path) -> tuple[Path, Path]:
    """A model with modules that leave a mark when they are run, named everywhere where transformers looks."""
    canary = room / "canary"
    config = {**CONFIG, "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    folder = model(room / "coded", config=config)
    for name in ("evil.py", "modeling_evil.py", "tokenization_evil.py", "__init__.py", "conftest.py", "setup.py"):
        (folder / name).write_text(EVIL.format(canary=str(canary)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "other/repo--evil.Evil"}}))
    return folder, canary


@attack(22)
def python_files(room: Path) -> str:
    """a model whose config names Python files in its folder: merge, plan, inspect and verify it"""
    import mergekit_lr

    folder, canary = with_code(room)
    out = room / "out"
    report = merged(folder, model(room / "plain"), out=out)
    mergekit_lr.inspect(str(folder)).summary_lines()
    mergekit_lr.verify(folder)
    assert not canary.exists() and "evil" not in sys.modules
    assert not list(out.glob("*.py")), "code was copied"
    for path in out.glob("*.json"):
        if path.name != "merge_report.json":
            assert not list(references(json.loads(path.read_text()))), path.name
    said = [w for w in report["warnings"] if "names code" in w or "named code" in w]
    assert len(said) == 3 and any("auto_map" in w for w in said), report["warnings"]
    return f"never run, not copied, auto_map dropped: {said[0].replace(str(room), '')}"


@attack(22)
def code_that_was_asked_for(room: Path) -> str:
    """the same with --copy-code: files that lead out of the folder, pipes and huge ones; code of other repositories"""
    import mergekit_lr

    folder, canary = with_code(room)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] |= {"AutoModel": "evil/repo--evil.Evil", "AutoBackbone": "../evil.Evil", "Other": "gone.Evil"}
    config["attn_implementation"] = "evil/kernels"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "a-b.py").write_text("")
    recipe = {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1.0}}]}
    out = room / "out"
    report = mergekit_lr.merge(recipe, out, device="cpu", threads=1, copy_code=True).report
    assert not canary.exists() and "evil" not in sys.modules
    copied = sorted(p.name for p in out.glob("*.py"))
    assert copied == [c["file"] for c in report["code"]]
    assert copied == sorted(p.name for p in folder.glob("*.py") if p.name != "a-b.py")
    written = json.loads((out / "config.json").read_text())
    assert written["auto_map"] == {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    assert "attn_implementation" not in written
    assert json.loads((out / "processor_config.json").read_text()) == {}
    assert sum("trust_remote_code runs it" in w for w in report["warnings"]) == 1
    line = ""
    (room / "elsewhere.py").write_text("secret")
    for kind in ("link", "pipe", "huge", "folder"):
        bad = folder / "bad.py"
        if kind == "link":
            bad.symlink_to(room / "elsewhere.py")
        elif kind == "pipe":
            os.mkfifo(bad)
        elif kind == "folder":
            bad.mkdir()
        else:
            with bad.open("wb") as f:
                f.truncate(1 << 40)
        began = time.monotonic()
        line = refused(
            lambda: mergekit_lr.merge(recipe, room / "bad", device="cpu", threads=1, copy_code=True),
            "'bad.py' is not carried over", kind=CheckpointError,
        )  # fmt: skip
        assert time.monotonic() - began < 5 and not (room / "bad").exists() and not (room / "bad.partial").exists()
        bad.rmdir() if kind == "folder" else bad.unlink()
    return f"{len(copied)} files as bytes, other code dropped; {line.replace(str(room), '')}"


@attack(22)
def transformers_is_not_let_loose(room: Path) -> str:
    """the same model, loaded by transformers to evaluate it"""
    from mergekit_lr.evaluation import load_for_evaluation

    folder, canary = with_code(room)
    config = {**json.loads((folder / "config.json").read_text()), "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    line = refused(lambda: load_for_evaluation(folder), "transformers cannot load the model", kind=CheckpointError)
    assert not canary.exists()
    return line


KERNELS = [
    {"attn_implementation": "evil/kernels"},
    {"_attn_implementation": "evil/kernels@main"},
    {"_attn_implementation": "paged|evil/kernels:attention"},
    {"experts_implementation": "evil/kernels"},
    {"text_config": {"attn_implementation": "evil/kernels"}},
    {"attn_implementation": {"": "sdpa", "vision_config": "evil/kernels"}},
]


@attack(22)
def kernels(room: Path) -> str:
    """a config names compiled kernels in a repository, which transformers downloads and loads without asking"""
    from mergekit_lr.calibration.network import Network
    from mergekit_lr.checkpoint.model import open_folder
    from mergekit_lr.evaluation import load_for_evaluation

    line = ""
    for number, entry in enumerate(KERNELS):
        folder = model(room / str(number), config={**CONFIG, **entry})
        with watched() as seen:
            line = refused(lambda folder=folder: load_for_evaluation(folder), "code of a repository")
            with open_folder(folder, "m") as checkpoint:
                refused(lambda c=checkpoint: Network(c, None, "cpu"), "code of a repository")  # type: ignore[arg-type]
        assert not any(event.startswith("socket.connect") for event, _ in seen)
        report = merged(folder, model(room / f"plain{number}"), out=room / f"out{number}")
        written = json.loads((room / f"out{number}" / "config.json").read_text())
        assert "evil" not in json.dumps(written) and any("names code" in w for w in report["warnings"])
    return f"{len(KERNELS)} kinds: {line}"


@attack(22)
def code_through_a_reduction(room: Path) -> str:
    """a bundle's config names code, and is written out again for each of its tasks"""
    from mergekit_lr.checkpoint.foreign_code import without_code

    hostile = {"a": [{"auto_map": {"x": "evil.Evil"}}], "custom_pipelines": {"x": {"impl": "evil.Evil"}}, "keep": 1}
    cleaned, found = without_code(hostile)
    assert cleaned == {"a": [{}], "keep": 1} and sorted(found) == ["a.0.auto_map", "custom_pipelines"]
    import mergekit_lr

    base = model(room / "base")
    packing = {
        "merge_method": "tall_masks", "base_model": str(base), "parameters": {"lambda": 0.4},
        "models": [{"model": str(model(room / n)), "name": n} for n in ("one", "two")],
    }  # fmt: skip
    mergekit_lr.merge(packing, room / "bundle", device="cpu", threads=1)
    shared = room / "bundle" / "shared"
    config = json.loads((shared / "config.json").read_text())
    (shared / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Evil"}}))
    (shared / "evil.py").write_text(EVIL.format(canary=str(room / "canary")))
    (shared / "tokenizer.pkl").write_bytes(b"cos\nsystem\n(Vtouch\ntR.")
    mergekit_lr.recover(room / "bundle", "one", room / "one-again", device="cpu", threads=1)
    written = sorted(p.name for p in (room / "one-again").iterdir())
    assert "evil.py" not in written and "tokenizer.pkl" not in written, written
    assert "auto_map" not in json.loads((room / "one-again" / "config.json").read_text())
    return f"dropped; the recovered folder holds {', '.join(written)}"


TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{% include '/etc/passwd' %}",
]


@attack(23)
def chat_templates(room: Path) -> str:
    """templates that escape from jinja, loop for ever or read files: the text is copied and never rendered"""
    other = model(room / "other")
    for number, text in enumerate(TEMPLATES):
        evil = text.replace("CANARY", str(room / "canary"))
        folder = model(room / str(number))
        (folder / "chat_template.jinja").write_text(evil)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": evil}))
        before = "jinja2" in sys.modules
        began = time.process_time()
        merged(folder, other, out=room / f"out{number}")
        assert time.process_time() - began < 5 and ("jinja2" in sys.modules) == before
        assert (room / f"out{number}" / "chat_template.jinja").read_text() == evil
        assert (room / f"out{number}" / "tokenizer_config.json").read_bytes() == (
            folder / "tokenizer_config.json"
        ).read_bytes()
    assert not (room / "canary").exists()
    return f"{len(TEMPLATES)} templates copied byte for byte, none rendered"


STRAY = [
    "tokenizer.pkl", "tokenizer.bin", "vocab.pkl", "training_args.bin", "optimizer.pt", "scheduler.pt", "run.sh",
    "__init__.py", "libevil.so", "evil.pth", ".env", ".git", "adapter_model.bin", "requirements.txt", "Makefile",
]  # fmt: skip


@attack(23)
def uninvited_files(room: Path) -> str:
    """15 kinds of files that no model needs: pickled tokenizers, programs, secrets"""
    folder = model(room / "a")
    for name in STRAY:
        (folder / name).write_bytes(b"cos\nsystem\n(Vtouch canary\ntR.")
    with watched() as seen:
        merged(folder, model(room / "b"), out=room / "out")
    assert not any(event == "open" and Path(what).name in STRAY and "/a/" in what for event, what in seen)
    left = sorted(p.name for p in (room / "out").iterdir())
    assert not set(left) & set(STRAY)
    return f"none opened, none copied; the output holds {', '.join(left)}"


@attack(23)
def huge_file(room: Path) -> str:
    """a tokenizer of 10 GB, sparse"""
    folder = model(room / "a")
    for name in ("tokenizer.model", "chat_template.jinja", "generation_config.json"):
        with (folder / name).open("wb") as f:
            f.truncate(10 << 30)
    report = merged(folder, model(room / "b"), out=room / "out")
    assert not {"tokenizer.model", "chat_template.jinja"} & {p.name for p in (room / "out").iterdir()}
    [line] = [w for w in report["warnings"] if "tokenizer.model" in w]
    with (folder / "tokenizer.json").open("wb") as f:
        f.truncate(10 << 30)
    refused(lambda: merged(folder, room / "b", out=room / "again"), "too large", kind=CheckpointError)
    return line.replace(str(room), "")


@attack(23)
def pipes(room: Path) -> str:
    """named pipes in place of files: reading one waits for ever"""
    lines = []
    for name in ("tokenizer.model", "README.md", "chat_template.jinja", "tokenizer.json", "generation_config.json"):
        folder = model(room / name)
        os.mkfifo(folder / name)
        report = merged(folder, out=room / f"out-{name}")
        lines += [w for w in report["warnings"] if name in w]
    for name in ("config.json", "model.safetensors.index.json", "model.safetensors"):
        folder = model(room / name)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        lines.append(refused(lambda n=name, f=folder: merged(f, out=room / f"out-{n}"), "not a regular file"))
    return f"8 pipes, no waiting: {lines[-1]}"


@attack(23)
def broken_tokenizer(room: Path) -> str:
    """tokenizer files of the wrong shape: lists for mappings, numbers for texts, a terabyte of nesting"""
    shapes = ["[]", "{}", '{"model": 1}', '{"model": {"vocab": 7}}', '{"model": {"vocab": [[]]}}', '{"model": []}',
              '{"model": {"vocab": {}}, "added_tokens": [1]}', '{"model": {"vocab": {"a": "b"}}}',
              '{"model": {"vocab": {"a": {}}}}', "{" * 9, "[" * 50_000, '{"a": 1, "a": 2}', "\x00",
              '{"model": {"vocab": {"a": 1e999}}}']  # fmt: skip
    other = model(room / "other")
    (other / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    refusals = 0
    for number, text in enumerate(shapes):
        folder = model(room / str(number))
        (folder / "tokenizer.json").write_text(text)
        try:
            merged(folder, other, out=room / f"out{number}")
        except CheckpointError:
            refusals += 1
    assert refusals >= 6
    return f"{len(shapes)} files: {refusals} refused, the others copied and not compared"


main(__name__)
