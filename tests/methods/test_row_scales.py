"""Row scales against the formula, and their fit against gradients of the scales themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mergekit_lr
from mergekit_lr.errors import CheckpointError, MergekitLrError, ResourceError, UsageError
from mergekit_lr.pieces import apply
from mergekit_lr.registry import tensor_method

METHOD = tensor_method("row_scales")
TEXT = Path(__file__).parents[2] / "examples" / "text" / "heldout"
MODELS = Path(__file__).parents[2] / "examples" / "models"


@given(rows=st.integers(1, 40), width=st.integers(1, 30), most=st.sampled_from([None, 65_536]), seed=st.integers(0, 99))
def test_every_row_has_its_own_factor(rows: int, width: int, most: int | None, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    base, *models = (torch.randn(rows, width, generator=g) for _ in range(3))
    scales = [torch.randn(rows, generator=g) for _ in models]
    got = apply(METHOD, models, base, models=[{"scales": "x"}] * 2, merge={"lambda": 0.5}, extra=scales, most=most)
    want = base.double()
    for x, s in zip(models, scales, strict=True):
        want = want + 0.5 * s.double()[:, None] * (x.double() - base.double())
    assert torch.allclose(got.double(), want, atol=1e-5)


def test_rows_longer_and_shorter_than_a_piece() -> None:
    for shape in ((3, 150_000), (150_000, 3), (200_000,)):
        base, x = torch.zeros(shape), torch.ones(shape)
        s = torch.arange(shape[0], dtype=torch.float32)
        got = apply(METHOD, [x], base, models=[{"scales": "x"}], extra=[s], most=65_536)
        assert torch.equal(got, s.view(-1, *(1,) * (len(shape) - 1)).expand(shape))


def written(tmp_path: Path, rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A recipe of one model over a base of two tensors, with this file of scales."""
    for k, name in enumerate(("base", "a")):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((4, 6), float(k)), "b": torch.ones(4) * k}, tmp_path / name / "model.safetensors")
    save_file(rows, tmp_path / "s.safetensors")
    return {
        "merge_method": "row_scales",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "a"), "parameters": {"scales": str(tmp_path / "s.safetensors")}}],
    }


def test_a_merge_reads_the_factors_beside_the_weights(tmp_path: Path) -> None:
    s = torch.tensor([0.0, 0.5, -1.0, 2.0])
    recipe = written(tmp_path, {"w.scale": s, "b.scale": s.clone()})
    out = mergekit_lr.merge(recipe, tmp_path / "out", threads=1).out
    merged = load_file(out / "model.safetensors")
    assert torch.equal(merged["w"], s[:, None].expand(4, 6)) and torch.equal(merged["b"], s)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"w.scale": torch.ones(6), "b.scale": torch.ones(4)}, "[6] where [4]"),
        ({"w.scale": torch.ones(4)}, "no entry for 1 tensors: b"),
        ({"w.scale": torch.tensor([1, float("nan"), 1, 1]), "b.scale": torch.ones(4)}, "NaN"),
    ],
)
def test_factors_that_do_not_fit_are_refused(tmp_path: Path, rows: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(MergekitLrError, match=words.replace("[", r"\[").replace("]", r"\]")):
        mergekit_lr.merge(written(tmp_path, rows), tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def recipe_of(tmp_path: Path) -> dict[str, Any]:
    return {
        "merge_method": "row_scales",
        "base_model": str(MODELS / "base"),
        "models": [
            {"model": str(MODELS / m), "parameters": {"scales": str(tmp_path / "scales" / f"{m}.safetensors")}}
            for m in ("python", "german")
        ],
        "out_dtype": "float32",
    }


TEXTS = [TEXT / "python.txt", TEXT / "german.txt"]
MORE: dict[str, Any] = {"samples": 64, "sequence_length": 64, "device": "cpu"}
SMALL: dict[str, Any] = {"samples": 16, "sequence_length": 64, "device": "cpu"}


def test_the_fit_goes_down_the_gradient_of_the_scales(tmp_path: Path) -> None:
    """One step of Adam is minus the rate in each coordinate, so its sign is that of the gradient by autograd."""
    from torch.func import functional_call

    from mergekit_lr.curvatures.estimate import sequences
    from mergekit_lr.evaluation import load_for_evaluation

    recipe = recipe_of(tmp_path)
    fitted = mergekit_lr.fit_scales(recipe, TEXTS, steps=1, rate=0.05, **SMALL)
    found = [load_file(f) for f in fitted.files]
    network, tokenizer = load_for_evaluation(MODELS / "base")
    base = {n: p.detach() for n, p in network.named_parameters()}
    deltas = []
    for m in ("python", "german"):
        own = dict(load_for_evaluation(MODELS / m)[0].named_parameters())
        deltas.append({n: own[n].detach() - base[n] for n in base})
    scales = [{n: torch.full(p.shape[:1], 0.5, requires_grad=True) for n, p in base.items()} for _ in deltas]
    weights = dict(base)
    for s, d in zip(scales, deltas, strict=True):
        weights = {n: w + s[n].view(-1, *(1,) * (w.dim() - 1)) * d[n] for n, w in weights.items()}
    loss = torch.zeros(())
    for text in TEXTS:
        for k, ids in enumerate(sequences(tokenizer, [text], 8, 64)):
            if k < 6:
                logits = functional_call(network, weights, kwargs={"input_ids": ids[None]}, tie_weights=True).logits
                loss = loss + torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:])
    (loss / 12).backward()  # type: ignore[no-untyped-call]
    assert fitted.steps == 1, "the first step lowers the loss on what is held back"
    for s, f in zip(scales, found, strict=True):
        for name, scale in s.items():
            assert scale.grad is not None
            clear = scale.grad.abs() > 1e-6
            moved = f[f"{name}.scale"] - 0.5
            assert torch.equal(moved[clear].sign(), -scale.grad[clear].sign()), name
            assert moved[clear].abs().sub(0.05).abs().max() < 1e-3


def test_a_fit_lowers_the_loss_and_is_reproducible(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    once = mergekit_lr.fit_scales(recipe, TEXTS, steps=3, rate=0.03, **MORE)
    assert once.losses[once.steps] == min(once.losses) < once.losses[0] - 0.005
    bytes_of = [f.read_bytes() for f in once.files]
    with pytest.raises(UsageError, match="exists"):
        mergekit_lr.fit_scales(recipe, TEXTS, steps=3, rate=0.03, **MORE)
    again = mergekit_lr.fit_scales(recipe, TEXTS, steps=3, rate=0.03, overwrite=True, **MORE)
    assert [f.read_bytes() for f in again.files] == bytes_of
    # The merge with these files has the loss that the fit saw: what is measured is what is written.
    entries = [{"model": m["model"], "parameters": {"weight": 0.5}} for m in recipe["models"]]
    plain = mergekit_lr.merge(recipe | {"merge_method": "task_arithmetic", "models": entries}, tmp_path / "plain").out
    scaled = mergekit_lr.merge(recipe, tmp_path / "scaled").out
    losses = [mergekit_lr.evaluate(m, TEXTS, context=64, max_tokens=2000)["mean"] for m in (plain, scaled)]
    assert losses[1] < losses[0] - 0.01


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(UsageError, match="no text"):
        mergekit_lr.fit_scales(recipe, [])
    with pytest.raises(UsageError, match="out of range"):
        mergekit_lr.fit_scales(recipe, TEXTS, samples=1)
    with pytest.raises(ResourceError, match="does not fit in memory"):
        mergekit_lr.fit_scales(recipe, TEXTS, max_memory="1MB", **SMALL)
    with pytest.raises(UsageError, match="its method is linear"):
        mergekit_lr.fit_scales({"merge_method": "linear", "models": [
            {"model": str(MODELS / "base"), "parameters": {"weight": 1}}]}, TEXTS)  # fmt: skip
    same = recipe["models"][0]["parameters"]["scales"]
    recipe["models"][1]["parameters"]["scales"] = same
    with pytest.raises(UsageError, match="same file"):
        mergekit_lr.fit_scales(recipe, TEXTS)
    (tmp_path / "raw").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "raw" / "model.safetensors")
    raw = recipe_of(tmp_path) | {"base_model": str(tmp_path / "raw")}
    with pytest.raises(CheckpointError):
        mergekit_lr.fit_scales(raw, TEXTS)
    assert not (tmp_path / "scales").exists()
