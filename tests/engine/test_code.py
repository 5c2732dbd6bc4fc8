"""``copy_code``: what is carried over, what is said of it, and that the output loads with it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_lr
from mergekit_lr import merge
from mergekit_lr.checkpoint.foreign_code import references, without_code
from mergekit_lr.engine import code_files
from mergekit_lr.errors import CheckpointError, UsageError
from mergekit_lr.report.code import code_problems

CONFIGURATION = """
from transformers import PretrainedConfig

class OddConfig(PretrainedConfig):
    model_type = "odd-family"

    def __init__(self, hidden_size=4, vocab_size=6, **more):
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        super().__init__(**more)
"""
MODELING = """
import torch
from transformers import PreTrainedModel
from .configuration_odd import OddConfig

class OddModel(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        return 3 * self.head(torch.sin(self.embed(input_ids)))
"""
AUTO_MAP = {"AutoConfig": "configuration_odd.OddConfig", "AutoModel": "modeling_odd.OddModel"}
SHAPES = {"embed.weight": (6, 4), "head.weight": (6, 4)}


def odd_model(folder: Path, seed: int, *, code: bool = True) -> Path:
    """A model of a family that only its own code knows."""
    folder.mkdir()
    config = {"model_type": "odd-family", "hidden_size": 4, "vocab_size": 6, "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    g = torch.Generator().manual_seed(seed)
    save_file({n: torch.randn(s, generator=g) for n, s in SHAPES.items()}, folder / "model.safetensors")
    if code:
        (folder / "configuration_odd.py").write_text(CONFIGURATION)
        (folder / "modeling_odd.py").write_text(MODELING)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    models = [odd_model(tmp_path / "a", 0), odd_model(tmp_path / "b", 1, code=False)]
    return linear(*models)


def linear(*models: Path | str, **more: Any) -> dict[str, Any]:
    entries = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]
    return {"merge_method": "linear", "models": entries, **more}


LOAD = """
import json, sys, torch
from transformers import AutoModel
model, said = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(said[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
print(json.dumps([type(model).__name__, model(torch.arange(6)).tolist()]))
"""


def test_the_output_loads_with_its_own_code(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(recipe, out, device="cpu", copy_code=True)
    assert sorted(p.name for p in out.glob("*.py")) == ["configuration_odd.py", "modeling_odd.py"]
    assert (out / "modeling_odd.py").read_text() == MODELING
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kind, got = json.loads(done.stdout.splitlines()[-1])
    merged = [load_file(tmp_path / m / "model.safetensors") for m in "ab"]
    embed, head = ((merged[0][n] + merged[1][n]) / 2 for n in SHAPES)
    assert kind == "OddModel"
    assert torch.allclose(torch.tensor(got), 3 * embed.sin() @ head.T, atol=1e-5)


def test_what_is_said_of_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = merge(recipe, out, device="cpu", copy_code=True).report
    digests = {n: hashlib.sha256(t.encode()).hexdigest() for n, t in
               (("configuration_odd.py", CONFIGURATION), ("modeling_odd.py", MODELING))}  # fmt: skip
    assert [(c["file"], c["sha256"]) for c in report["code"]] == list(digests.items())
    assert {c["model"] for c in report["code"]} == {str(tmp_path / "a")}
    assert any("code is carried over, unread (configuration_odd.py, modeling_odd.py)" in w for w in report["warnings"])
    card = (out / "README.md").read_text()
    assert "## Code" in card and all(f"* `{n}`, sha256 `{d}`" in card for n, d in digests.items())
    assert json.loads((out / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert mergekit_lr.verify(out).problems == []
    (out / "modeling_odd.py").write_text(MODELING + "evil()")
    assert mergekit_lr.verify(out).problems == ["the code 'modeling_odd.py' is not as it was written: do not run it"]
    (out / "modeling_odd.py").unlink()
    assert "cannot be checked" in mergekit_lr.verify(out).problems[0]
    plain = merge(recipe, tmp_path / "plain", device="cpu").report
    assert "code" not in plain and "## Code" not in (tmp_path / "plain" / "README.md").read_text()
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        ({"code": {}}, "that is no list"),
        ({"code": [{"file": "x.py"}]}, "without file or sha256"),
        ({"code": [7]}, "without file or sha256"),
        ({"code": [{"file": "../x.py", "sha256": ""}]}, "cannot be checked: '../x.py' is not a plain file name"),
    ],
)
def test_a_report_that_lies(report: dict[str, Any], problem: str, tmp_path: Path) -> None:
    [found] = code_problems(tmp_path, report)
    assert problem in found


def test_a_model_without_code_says_so(tmp_path: Path) -> None:
    models = [odd_model(tmp_path / n, i, code=False) for i, n in enumerate("ab")]
    report = merge(linear(*models), tmp_path / "out", device="cpu", copy_code=True).report
    assert any("there are no Python files to carry over" in w for w in report["warnings"])
    assert any("its config names code (auto_map)" in w for w in report["warnings"])
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


CHANGES = {"without": None, "other code": "modeling_odd.py", "more code": "more.py"}


@pytest.mark.parametrize("change", CHANGES)
def test_another_code_is_another_run(
    change: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_lr.engine.execute import Worker

    def stop(self: Worker, unit: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Worker, "run", stop)
        merge(recipe, out, device="cpu", copy_code=True)
    file = CHANGES[change]
    if file is not None:
        (tmp_path / "a" / file).write_text("x = 1")
    with pytest.raises(UsageError, match=r"unfinished work.*changed since: code"):
        merge(recipe, out, device="cpu", copy_code=file is not None)
    merge(recipe, out, device="cpu", copy_code=file is not None, resume=False)


def test_parts_must_agree_on_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(recipe, out, device="cpu", part="1/2", copy_code=True)
    (tmp_path / "a" / "modeling_odd.py").write_text(MODELING + "\n")
    for copy_code in (False, True):
        with pytest.raises(UsageError, match=r"unfinished parts.*changed since: code"):
            merge(recipe, out, device="cpu", part="2/2", copy_code=copy_code)
    (tmp_path / "a" / "modeling_odd.py").write_text(MODELING)
    merge(recipe, out, device="cpu", part="2/2", copy_code=True)
    merge(recipe, tmp_path / "whole", device="cpu", copy_code=True)
    names = sorted(p.name for p in out.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "whole").iterdir()) and "modeling_odd.py" in names


@pytest.mark.parametrize("method", ["linear", "model_stock"], ids=["streamed", "written"])
def test_through_a_stage(method: str, tmp_path: Path) -> None:
    models = [odd_model(tmp_path / n, i) for i, n in enumerate("abc")]
    stage = linear(*models[1:]) if method == "linear" else {
        "merge_method": "model_stock", "base_model": str(models[0]), "models": [{"model": str(m)} for m in models[1:]],
    }  # fmt: skip
    merge(linear("inner", models[0], stages={"inner": stage}), tmp_path / "out", device="cpu", copy_code=True)
    assert (tmp_path / "out" / "modeling_odd.py").read_text() == MODELING
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_two_models_that_differ_are_an_error(tmp_path: Path) -> None:
    models = [odd_model(tmp_path / n, i) for i, n in enumerate("ab")]
    with mergekit_opened(models) as (a, b):
        assert [c.name for c in code_files.code_of(a, b)] == ["configuration_odd.py", "modeling_odd.py"]
        (models[1] / "tokenization_odd.py").write_text("x")
        assert [(c.name, c.model) for c in code_files.code_of(a, b)][2] == ("tokenization_odd.py", str(models[1]))
        (models[1] / "modeling_odd.py").write_text("x")
        with pytest.raises(CheckpointError, match=r"different files 'modeling_odd.py'.*leave out --copy-code"):
            code_files.code_of(a, b)


def mergekit_opened(models: list[Path]) -> Any:
    from contextlib import ExitStack, contextmanager

    from mergekit_lr.checkpoint.model import open_folder

    @contextmanager
    def opened() -> Any:
        with ExitStack() as stack:
            yield [stack.enter_context(open_folder(m, str(m))) for m in models]

    return opened()


def test_there_may_not_be_too_many(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_files, "MOST", 1)
    with pytest.raises(CheckpointError, match=r"there are 2 Python files.*at most 1"):
        merge(recipe, tmp_path / "out", device="cpu", copy_code=True)


def test_a_bundle_takes_none(tmp_path: Path) -> None:
    a, b, c = (str(odd_model(tmp_path / n, i)) for i, n in enumerate("abc"))
    packing = {
        "merge_method": "tall_masks", "base_model": a, "parameters": {"lambda": 0.4},
        "models": [{"model": b, "name": "one"}, {"model": c, "name": "two"}],
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"not carried over into a bundle.*leave out --copy-code"):
        merge(packing, tmp_path / "out", device="cpu", copy_code=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


KEPT = {"AutoModel": "modeling.Model"}


@pytest.mark.parametrize(
    ("content", "cleaned", "found"),
    [
        ({"auto_map": KEPT}, {"auto_map": KEPT}, []),
        (
            {"auto_map": {**KEPT, "AutoConfig": "org/name--modeling.Config", "X": "other.Y", "Z": "modeling.a.b"}},
            {"auto_map": KEPT},
            ["auto_map.AutoConfig", "auto_map.X", "auto_map.Z"],
        ),
        ({"auto_map": {"AutoTokenizer": ["modeling.Slow", None]}}, None, []),
        ({"auto_map": {"AutoTokenizer": ["modeling.Slow", "other.Fast"]}}, {}, ["auto_map"]),
        ({"auto_map": {"AutoTokenizer": [None, None]}}, {}, ["auto_map"]),
        ({"auto_map": "modeling.Model"}, {}, ["auto_map"]),
        ({"auto_map": {"A": "modeling.x-y"}}, {}, ["auto_map"]),
        ({"auto_map": {"A": 7}}, {}, ["auto_map"]),
        ({"text_config": {"auto_map": KEPT}}, {"text_config": {"auto_map": KEPT}}, []),
        ({"custom_pipelines": {"p": {"impl": "modeling.P", "pt": []}}}, None, []),
        (
            {"custom_pipelines": {"p": {"impl": "modeling.P"}, "q": {"impl": "evil.P"}, "r": {}}},
            {"custom_pipelines": {"p": {"impl": "modeling.P"}}},
            ["custom_pipelines.q", "custom_pipelines.r"],
        ),
        ({"attn_implementation": "org/kernels"}, {}, ["attn_implementation"]),
        ({"custom_pipelines": {"p": {"impl": {"impl": "modeling.P"}}}}, {}, ["custom_pipelines"]),
    ],
)
def test_what_names_code_that_comes_along(content: Any, cleaned: Any, found: list[str]) -> None:
    got, said = without_code(content, {"modeling"})
    assert (got, said) == (content if cleaned is None else cleaned, found)
    assert list(references(got, modules={"modeling"})) == []
    assert list(references(without_code(content)[0])) == []
