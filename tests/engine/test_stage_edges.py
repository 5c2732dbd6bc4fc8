"""Stages at their edges: what is copied, empty or prepared in them, what cannot be a stage, and stages of parts."""

from __future__ import annotations

import errno
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lr import merge, plan
from mergekit_lr.engine import parts as parts_module
from mergekit_lr.engine.plain import NotPlain
from mergekit_lr.engine.plan import planned
from mergekit_lr.engine.shared_space import SharedSpace
from mergekit_lr.errors import ResourceError, UsageError

from .test_parts import files, in_parts
from .test_stages import recipe_of
from .toy_rewrite import registered


@pytest.fixture
def models(make, random_tensors) -> dict[str, str]:
    """Matrices, a vector, an empty tensor, and positions, which are copied."""
    shapes = {"a.weight": (40, 30), "b.weight": (6, 8), "c.weight": (30,), "none.weight": (0, 4)}
    whole = {"positions": torch.arange(12)}
    return {n: str(make(n, random_tensors(i, shapes=shapes) | whole)) for i, n in enumerate("wxyz")}


def halves_of(models: dict[str, str], load: Any, out: Path) -> dict[str, torch.Tensor]:
    """fp64 mean of the two stored models, cast as a stage would write it."""
    x, y = load(Path(models["x"])), load(Path(models["y"]))
    return {n: ((x[n].double() + y[n].double()) / 2).to(x[n].dtype) if n != "positions" else x[n] for n in x}


def test_a_streamed_stage_gives_copied_and_empty_tensors_too(models, load, tmp_path):
    stage = recipe_of("linear", None, [models["x"], models["y"]])
    end = {"merge_method": "passthrough", "models": [{"model": "stage"}], "stages": {"stage": stage}}
    report = merge(end, tmp_path / "out", device="cpu").report
    assert report["stages"][0]["how"] == "streamed"
    out, expected = load(tmp_path / "out"), halves_of(models, load, tmp_path)
    assert out.keys() == expected.keys()
    assert all(torch.equal(out[n], expected[n]) for n in expected)
    assert report["rules"]["copied: I64 is not averaged"] == 1


def test_stages_of_models_without_small_files(models, load, tmp_path):
    for model in models.values():
        (Path(model) / "config.json").unlink()
    stage = recipe_of("linear", None, [models["x"], models["y"]])
    end = {"merge_method": "passthrough", "models": [{"model": "stage"}], "stages": {"stage": stage}}
    merge(end, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "config.json").exists()
    out, expected = load(tmp_path / "out"), halves_of(models, load, tmp_path)
    assert all(torch.equal(out[n], expected[n]) for n in expected)


@pytest.mark.parametrize("refused", ["folder", "file"])
def test_small_files_of_a_stage_that_cannot_be_kept(refused, models, tmp_path, monkeypatch):
    stage = recipe_of("linear", None, [models["x"], models["y"]])
    end = {"merge_method": "passthrough", "models": [{"model": "stage"}], "stages": {"stage": stage}}
    place, write = tmp_path / "temporary", Path.write_bytes
    monkeypatch.setattr(tempfile, "tempdir", str(place))

    def full(path: Path, data: bytes) -> int:
        if path.is_relative_to(place):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    if refused == "file":
        place.mkdir()
        monkeypatch.setattr(Path, "write_bytes", full)
    why = "No such file" if refused == "folder" else "No space left"
    with pytest.raises(ResourceError, match=rf"cannot keep a stage's small files.*{why}.*set TMPDIR") as e:
        merge(end, tmp_path / "out", device="cpu")
    assert str(place) in str(e.value)
    assert not (tmp_path / "out").exists() and not (place.exists() and list(place.iterdir()))


def test_a_bundle_is_no_stage(models, tmp_path):
    entries = [{"model": models[n], "name": n} for n in "xy"]
    stage = {"merge_method": "tall_masks", "base_model": models["w"], "models": entries}
    end = recipe_of("linear", None, ["packed", models["z"]]) | {"stages": {"packed": stage}}
    with pytest.raises(UsageError, match=r"stage 'packed' makes a bundle, not a model.*--stage packed"):
        merge(end, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_stage_that_must_be_written_needs_a_place(models):
    """`planned` by itself writes nothing; whoever uses it is told how to make the stage."""
    stage = recipe_of("ties", models["w"], [models["x"], models["y"]])
    end = recipe_of("ties", models["w"], ["stage", models["z"]]) | {"stages": {"stage": stage}}
    with pytest.raises(UsageError, match="must be written before") as e, planned(end, device="cpu"):
        pass
    assert e.value.fix.startswith("make it first: merge RECIPE FOLDER --stage stage")


def test_written_stages_of_written_stages(models, tmp_path):
    def of(base: str, other: str) -> dict[str, Any]:
        return recipe_of("ties", models["w"], [base, other])

    first, second, end = of(models["x"], models["y"]), of("first", models["z"]), of("second", models["x"])
    report = merge(end | {"stages": {"first": first, "second": second}}, tmp_path / "out", device="cpu").report
    assert [(s["name"], s["how"]) for s in report["stages"]] == [
        ("first", "written first"),
        ("second", "written first"),
    ]
    by_hand = tmp_path / "hand"
    by_hand.mkdir()
    merge(first, by_hand / "first", device="cpu")
    merge(of(str(by_hand / "first"), models["z"]), by_hand / "second", device="cpu")
    merge(of(str(by_hand / "second"), models["x"]), by_hand / "out", device="cpu")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (by_hand / "out" / name).read_bytes()
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture
def matrices(make, random_tensors) -> dict[str, str]:
    shapes = {"a.weight": (40, 32), "b.weight": (6, 8), "c.weight": (30,)}
    return {n: str(make(n, random_tensors(i, shapes=shapes))) for i, n in enumerate("wxy")}


def test_a_stage_whose_method_prepares(matrices, load, tmp_path, monkeypatch):
    registered(monkeypatch.setattr)
    stage = {"merge_method": "halves", "models": [{"model": matrices["x"]}]}
    end = {"merge_method": "passthrough", "models": [{"model": "stage"}], "stages": {"stage": stage}}
    merge(end, tmp_path / "out", device="cpu")
    x, out = load(Path(matrices["x"])), load(tmp_path / "out")
    assert torch.equal(out["a.top"], (x["a.weight"][:20].float() * 3).bfloat16())
    assert torch.equal(out["c.weight"], x["c.weight"])
    assert not (tmp_path / "out.partial").exists()


def test_a_method_with_an_order_of_its_own_reads_a_searching_stage_from_disk(matrices, load, tmp_path, monkeypatch):
    registered(monkeypatch.setattr)
    stage = recipe_of("ties", matrices["w"], [matrices["x"], matrices["y"]])
    end = {"merge_method": "halves", "models": [{"model": "stage"}], "stages": {"stage": stage}}
    report = merge(end, tmp_path / "out", device="cpu").report
    assert report["stages"][0]["how"] == "written first"
    merge(stage, tmp_path / "stage", device="cpu")
    a, out = load(tmp_path / "stage")["a.weight"], load(tmp_path / "out")
    assert torch.equal(out["a.top"], (a[:20].float() * 3).bfloat16())


def test_a_plan_says_how_stages_are_made_in_words(models):
    streamed = recipe_of("linear", None, [models["x"], models["y"]])
    end = recipe_of("linear", None, ["stage", models["z"]]) | {"stages": {"stage": streamed}}
    lines = plan(end, device="cpu").summary_lines()
    assert lines[0] == f"stage stage: linear of {models['x']}, {models['y']}; streamed"


def test_parts_of_a_recipe_with_a_stage(models, tmp_path):
    stage = recipe_of("linear", None, [models["x"], models["y"]])
    end = recipe_of("linear", None, ["stage", models["z"]]) | {"stages": {"stage": stage}}
    merge(end, tmp_path / "whole", device="cpu")
    in_parts(end, tmp_path / "out", [2, 1], 2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_parts_see_an_input_of_a_stage_change(models, tmp_path):
    stage = recipe_of("linear", None, [models["x"], models["y"]])
    end = recipe_of("linear", None, ["stage", models["z"]]) | {"stages": {"stage": stage}}
    in_parts(end, tmp_path / "out", [1], 2)
    path = Path(models["y"]) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(UsageError, match="changed since: inputs"):
        in_parts(end, tmp_path / "out", [2], 2)


@pytest.fixture
def ties(models) -> dict[str, Any]:
    scope = {"parameters": {"threshold_scope": "model"}}
    return recipe_of("ties", models["w"], [models["x"], models["y"]], **scope)


def test_statistics_that_have_no_form_as_text_are_computed_by_every_part(ties, tmp_path, monkeypatch):
    merge(ties, tmp_path / "whole", device="cpu")
    ran, compute = [], parts_module.compute_artifacts

    def no_form(value: object) -> str:
        raise NotPlain("tensor")

    monkeypatch.setattr(parts_module, "compute_artifacts", lambda *a: (ran.append(1), compute(*a)))
    monkeypatch.setattr(parts_module, "to_text", no_form)
    in_parts(ties, tmp_path / "out", [2, 1, 3], 3)
    assert len(ran) == 3
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_part_that_is_done_is_not_done_again(ties, tmp_path, monkeypatch):
    [first] = in_parts(ties, tmp_path / "out", [1], 2)
    journals = sorted((tmp_path / "out.partial").glob("journal-*"))
    [again] = in_parts(ties, tmp_path / "out", [1], 2)
    assert first.waiting_for == again.waiting_for == (2,)
    assert sorted((tmp_path / "out.partial").glob("journal-*")) == journals


def test_a_part_whose_bytes_were_cut_off_does_them_again(ties, tmp_path, monkeypatch):
    merge(ties, tmp_path / "whole", device="cpu")

    def stopped(self: object, *records: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(SharedSpace, "mark_done", stopped)
        with pytest.raises(KeyboardInterrupt):
            in_parts(ties, tmp_path / "out", [1], 2)
    shard = tmp_path / "out.partial" / "model" / "model.safetensors"
    header = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    with shard.open("r+b") as f:
        f.truncate(header + 100)
    in_parts(ties, tmp_path / "out", [1, 2], 2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_report_names_the_parts(ties, tmp_path):
    in_parts(ties, tmp_path / "out", [1, 2], 2)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_bytes())["run"]["parts"] == 2
