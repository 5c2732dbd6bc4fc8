"""What each command prints, where, and with which exit code. The engine is replaced where it is not the subject."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mergekit_lr
from mergekit_lr.engine.progress import ProgressEvent
from mergekit_lr.errors import (
    CheckpointError,
    LinalgError,
    MergekitLrError,
    NonFiniteError,
    RecipeError,
    ResourceError,
    UsageError,
    VerificationError,
)
from mergekit_lr.recipe import load_recipe

Run = Callable[..., Any]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, object], None]:
    """``replace("merge", function)``: what the command of that name calls."""

    def call(name: str, function: object) -> None:
        monkeypatch.setattr(mergekit_lr, name, function, raising=False)

    return call


def test_check_says_ok(run: Run, recipe: Path) -> None:
    done = run("check", recipe)
    assert (done.code, done.out, done.err) == (0, f"{recipe}: ok, linear of 2 models\n", "")


def test_check_prints_every_problem_on_standard_error(run: Run, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("dtype", "dtpye").replace("0.25", "x"))
    done = run("check", recipe)
    assert (done.code, done.out) == (3, "")
    assert done.err.splitlines() == [
        f"error: {recipe}:4:37: models[1].parameters.weight: 'x' is not a number; write a number",
        f"error: {recipe}:5:1: dtpye: unknown key; did you mean 'dtype'?",
    ]


def test_check_as_json(run: Run, recipe: Path) -> None:
    done = run("check", recipe, "--json")
    loaded = load_recipe(recipe)
    assert json.loads(done.out) == {"recipe": loaded.canonical(), "digest": loaded.digest(), "warnings": []}


def test_check_prints_warnings_on_standard_error(run: Run, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("model: b", "model: a"))
    done = run("check", recipe)
    assert done.code == 0
    assert done.err == f"warning: {recipe}:4:5: models[1]: names the same model as models[0]\n"


ERRORS = [
    (UsageError, 2),
    (RecipeError, 3),
    (CheckpointError, 4),
    (NonFiniteError, 4),
    (LinalgError, 4),
    (ResourceError, 5),
    (VerificationError, 6),
]


@pytest.mark.parametrize(("kind", "code"), ERRORS)
def test_each_family_of_errors_has_its_exit_code(
    run: Run, replace: Run, recipe: Path, tmp_path: Path, kind: type[MergekitLrError], code: int
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise kind("it went wrong", where="here", why="so", fix="do that")

    replace("merge", fail)
    done = run("merge", recipe, tmp_path / "out")
    assert (done.code, done.out) == (code, "")
    assert done.err == "error: here: it went wrong (so); do that\n"


def test_no_memory_is_a_matter_of_resources(run: Run, replace: Run, recipe: Path, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    replace("merge", fail)
    done = run("merge", recipe, tmp_path / "out")
    assert done.code == 5
    assert "--max-memory" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("merge",),
        ("merge", "r.yml"),
        ("merge", "r.yml", "out", "--threads", "0"),
        ("merge", "{recipe}", "{out}", "--part", "3/2"),
        ("nonsense",),
        ("check", "r.yml", "more"),
        ("eval", "model"),
        ("merge", "{recipe}", "{out}", "--max-memory", "lots"),
        ("plan", "{recipe}", "--device", "tpu"),
    ],
)
def test_wrong_usage_is_2_and_prints_no_result(
    run: Run, recipe: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    for name in ("a", "b"):
        make_model(tmp_path / name, 1.0)
    recipe.write_text(recipe.read_text().replace("model: ", f"model: {tmp_path}/"))
    done = run(*(a.format(recipe=recipe, out=tmp_path / "out") for a in arguments))
    assert done.code == 2
    assert done.err or not arguments
    assert not (tmp_path / "out").exists()


def test_an_unforeseen_exception_is_one_line_and_1(run_apart: Run, recipe: Path, tmp_path: Path) -> None:
    prelude = "import mergekit_lr\ndef boom(*a, **k): raise KeyError('odd\\nkey')\nmergekit_lr.merge = boom"
    done = run_apart("merge", recipe, tmp_path / "out", prelude=prelude)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: unexpected KeyError: ")
    assert done.err.count("\n") == 1
    assert "MERGEKIT_LR_DEBUG=1" in done.err


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(run_apart: Run, recipe: Path, tmp_path: Path, how: str) -> None:
    prelude = "import mergekit_lr\ndef boom(*a, **k): raise KeyError('odd')\nmergekit_lr.merge = boom"
    first = ["--debug"] if how == "option" else []
    if how == "environment":
        prelude += "\nimport os\nos.environ['MERGEKIT_LR_DEBUG'] = '1'"
    done = run_apart(*first, "merge", recipe, tmp_path / "out", prelude=prelude)
    assert done.code == 1
    assert "Traceback" in done.err
    assert "in boom" in done.err


def test_debug_keeps_the_exit_code(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEKIT_LR_DEBUG", "1")
    done = run("check", recipe.with_name("absent.yml"))
    assert done.code == 3
    assert "Traceback" in done.err


def test_an_interrupt_is_130_and_says_how_to_go_on(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import mergekit_lr, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits that it is ignored
        "def slow(*a, **k):\n    print('started', flush=True)\n    time.sleep(60)\n"
        "mergekit_lr.merge = slow\n"
        "from mergekit_lr.cli import main\nmain()\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", code, "merge", str(recipe), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(30) == 130
    assert err == f"interrupted; what is done is kept in {out}.partial, run the same command again to go on\n"


def test_a_reader_that_stops_early_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" schema | head -c 10; echo " ${PIPESTATUS[0]}"', sys.executable,
         "from mergekit_lr.cli import main; main()"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["{", '"$schem', "0"]
    assert done.stderr == ""


def fake_merge(seen: dict[str, Any]) -> Callable[..., Any]:
    def merge(recipe: Any, out: Path, **options: Any) -> Any:
        seen.update(options, recipe=recipe, out=out)
        if options["progress"]:
            options["progress"](ProgressEvent(500, 1000, "merging"))
        return SimpleNamespace(out=out, report={"warnings": ["odd"], "tensors": []}, waiting_for=(), pushed=None)

    return merge


def test_merge_passes_every_option_on(run: Run, replace: Run, recipe: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    replace("merge", fake_merge(seen))
    options = "--device cpu --max-memory 8GiB --threads 3 --shard-size 1GB --restart --overwrite --allow-pickle"
    options += " --part 1/4 --workers 3 --ray auto --offline --verify-inputs --copy-code"
    done = run("merge", recipe, tmp_path / "out", *options.split())
    assert done.code == 0
    assert done.out == f"{tmp_path / 'out'}\n"
    assert done.err.splitlines() == ["merging: 50% of 1.0 kB", "warning: odd"]
    assert seen.pop("recipe") == load_recipe(recipe)
    assert seen.pop("progress") is not None
    assert seen == {
        "out": tmp_path / "out",
        "device": "cpu",
        "max_memory": "8GiB",
        "threads": 3,
        "shard_size": "1GB",
        "resume": False,
        "overwrite": True,
        "allow_pickle": True,
        "part": "1/4",
        "workers": 3,
        "ray": "auto",
        "offline": True,
        "verify_inputs": True,
        "disk_budget": None,
        "push": None,
        "copy_code": True,
    }


def test_a_part_that_is_not_the_last_prints_no_result(run: Run, recipe: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_model(tmp_path / name, 1.0)
    recipe.write_text(recipe.read_text().replace("model: ", f"model: {tmp_path}/"))
    out = tmp_path / "out"
    first = run("merge", recipe, out, "--part", "3/3")
    assert (first.code, first.out) == (0, "")
    assert first.err.splitlines()[-1] == "part 3/3 is done; not done yet: 1, 2"
    second = run("merge", recipe, out, "--part", "1/3", "--json")
    assert json.loads(second.out) == {"out": str(out), "part": "1/3", "waiting_for": [2]}
    last = run("merge", recipe, out, "--part", "2/3")
    assert (last.code, last.out) == (0, f"{out}\n")


def test_merge_resumes_by_default(run: Run, replace: Run, recipe: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    replace("merge", fake_merge(seen))
    run("merge", recipe, tmp_path / "out")
    assert (seen["resume"], seen["overwrite"], seen["allow_pickle"]) == (True, False, False)


def test_quiet_says_nothing_and_json_is_one_value(run: Run, replace: Run, recipe: Path, tmp_path: Path) -> None:
    replace("merge", fake_merge({}))
    done = run("merge", recipe, tmp_path / "out", "--quiet", "--json")
    assert done.err == ""
    assert json.loads(done.out) == {"out": str(tmp_path / "out"), "warnings": ["odd"], "tensors": []}


def test_methods(run: Run) -> None:
    done = run("methods")
    assert done.code == 0
    assert any(line.startswith("ties ") for line in done.out.splitlines())
    one = run("methods", "ties")
    for part in ("arxiv.org/abs/2306.01708", "base_model is required", "density: a number, >= 0, <= 1, default 1.0"):
        assert part in one.out
    assert json.loads(run("methods", "ties", "--json").out)["name"] == "ties"
    wrong = run("methods", "teis")
    assert (wrong.code, wrong.out) == (3, "")
    assert "did you mean" in wrong.err


def test_schema_is_json(run: Run) -> None:
    assert json.loads(run("schema").out)["title"] == "mergekit_lr recipe"


def test_eval_takes_texts_after_the_option_and_repeated(run: Run, replace: Run) -> None:
    seen: dict[str, Any] = {}

    def evaluate(model: str, texts: list[Path], **options: Any) -> dict[str, Any]:
        seen.update(options, model=model, texts=texts)
        loss = {"loss": 2.0, "loss_per_byte": 0.5, "perplexity": 7.389, "tokens": 1200, "bytes": 4800}
        return {"model": model, "context": 64, "files": {str(t): loss for t in texts}, "mean": 2.0}

    replace("evaluate", evaluate)
    done = run("eval", "model", "--text", "a.txt", "b.txt", "--text", "c.txt", "--device", "cpu", "--context", "64")
    assert done.code == 0
    assert sorted(map(str, seen["texts"])) == ["a.txt", "b.txt", "c.txt"]
    assert (seen["model"], seen["device"], seen["context"], seen["max_tokens"]) == ("model", "cpu", 64, None)
    assert done.out.splitlines() == [
        "text   nats/token  nats/byte  perplexity  tokens",
        "a.txt      2.0000     0.5000        7.39   1,200",
        "c.txt      2.0000     0.5000        7.39   1,200",
        "b.txt      2.0000     0.5000        7.39   1,200",
        "mean       2.0000",
    ]


def make_model(folder: Path, value: float) -> None:
    """A model of two small tensors, all of one value."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    shapes = {"model.layers.0.mlp.up_proj.weight": (8, 4), "model.norm.weight": (4,)}
    save_file({n: torch.full(s, value) for n, s in shapes.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def test_the_real_thing(run_apart: Run, recipe: Path, tmp_path: Path) -> None:
    """Plan, merge, verify and inspect two small models; then damage the result and verify again."""
    from safetensors.numpy import load_file

    make_model(tmp_path / "a", 1.0)
    make_model(tmp_path / "b", 5.0)
    plan = run_apart("plan", recipe, "--json", "--device", "cpu", cwd=tmp_path)
    assert (plan.code, json.loads(plan.out)["tensors"]) == (0, 2)
    merge = run_apart("merge", recipe, "out", "--device", "cpu", "--json", cwd=tmp_path)
    assert merge.code == 0, merge.err
    assert json.loads(merge.out)["out"] == "out"
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert {float(x) for t in merged.values() for x in t.flat} == {0.75 * 1 + 0.25 * 5}
    verify = run_apart("verify", "out", cwd=tmp_path)
    assert (verify.code, verify.err) == (0, "")
    found = run_apart("inspect", "out", "--json", cwd=tmp_path)
    assert found.code == 0
    assert json.loads(found.out)
    again = run_apart("merge", recipe, tmp_path / "a", "--device", "cpu", cwd=tmp_path)
    assert again.code in (2, 4, 5)
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x01")
    damaged = run_apart("verify", "out", cwd=tmp_path)
    assert damaged.code == 6
    assert damaged.err.startswith("error: out: verification failed")


LIMITS = {"--help": 1.2, "check": 3.5}
"""In processor time of a process that only imports what any command line of this kind does."""


@pytest.mark.parametrize("command", LIMITS)
def test_no_torch_and_no_waiting(run_apart: Run, recipe: Path, command: str) -> None:
    """The best of five runs against the best of five of the imports alone, in turns: machines differ, ratios do not."""
    arguments = [command, recipe] if command == "check" else [command]
    prelude = "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    assert run_apart(*arguments, prelude=prelude).err == "False\n"

    def used(run: Callable[[], Any]) -> float:
        before = os.times()
        run()
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    imports = [sys.executable, "-c", "import numpy, pydantic, typer"]
    pairs = [(used(lambda: run_apart(*arguments)), used(lambda: subprocess.run(imports, check=True))) for _ in range(5)]
    assert min(p[0] for p in pairs) < LIMITS[command] * min(p[1] for p in pairs)


def test_calibrate_takes_texts_after_the_option_and_hands_everything_on(run: Run, replace: Run) -> None:
    asked: dict[str, Any] = {}

    def calibrate(model: str, out: Path, texts: list[str], **options: Any) -> dict[str, Any]:
        asked.update(options, model=model, out=out, texts=texts)
        return {"out": str(out)}

    replace("calibrate", calibrate)
    arguments = [
        "--text",
        "a.txt",
        "b.txt",
        "--text",
        "org/set",
        "--grams",
        "linear",
        "--grams",
        "input",
        "--samples",
        "7",
    ]
    done = run("calibrate", "model", "s.safetensors", *arguments, "--seed", "3", "--restart", "--quiet")
    assert done.code == 0 and done.out == "s.safetensors\n"
    assert set(asked["texts"]) == {"a.txt", "b.txt", "org/set"} and asked["grams"] == ["linear", "input"]
    assert (asked["samples"], asked["seed"], asked["resume"], asked["overwrite"]) == (7, 3, False, False)
    assert run("calibrate", "model", "s.safetensors").code == 2
