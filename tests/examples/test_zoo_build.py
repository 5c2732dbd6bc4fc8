"""The command: what it lists, what it plans, how it fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from zoo import build, vision


def test_every_part_needs_only_earlier_parts() -> None:
    seen: set[str] = set()
    for name, part in build.parts().items():
        assert set(part.needs) <= seen, name
        seen.add(name)


def test_plan_puts_needs_first_and_leaves_out_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = {name: replace(part, result=tmp_path / name) for name, part in build.parts().items()}
    monkeypatch.setattr(build, "parts", lambda: table)
    assert build.plan(["python"]) == ["text", "python"]  # tokenizer and base are in the repository
    assert build.plan(["base", "python"]) == ["text", "base", "python"]
    (tmp_path / "text").touch()
    assert build.plan(["python", "joint"]) == ["python", "joint"]
    (tmp_path / "python").touch()
    assert build.plan(["python"]) == []
    bare = {name: replace(part, committed=None) for name, part in table.items()}
    monkeypatch.setattr(build, "parts", lambda: bare)
    assert build.plan(["c"]) == ["base", "c"]
    assert build.plan(list(bare))[:2] == ["tokenizer", "base"]


def test_unknown_part_and_bad_job_count_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["pyhton"]) == 2
    assert "no part named pyhton; parts: tokenizer, text, base" in capsys.readouterr().err
    assert build.main(["--jobs", "0", "base"]) == 2
    assert "--jobs 0" in capsys.readouterr().err


def test_list_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(build.parts())


def test_perceptron_learns_digits_and_repeats_by_seed() -> None:
    torch.set_num_threads(1)

    def trained() -> vision.Perceptron:
        torch.manual_seed(0)
        model = vision.Perceptron(width=32)
        vision.train(model, seed=0, epochs=25)
        return model

    first, second = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    _, _, images, labels = vision.digits()
    assert vision.accuracy(first, images, labels) > 0.9


def test_vision_transformer_sees_patches_of_two_by_two() -> None:
    """With attention and MLP silenced, moving a whole patch only moves its position embedding's partner."""
    torch.manual_seed(0)
    model = vision.VisionTransformer()
    images = torch.zeros(1, 64)
    images[0, [2, 3, 10, 11]] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # rows 0-1, columns 2-3: patch 1
    seen: list[torch.Tensor] = []
    handle = model.patch.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    model(images)
    handle.remove()
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 1].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert seen[0].sum() == 10
