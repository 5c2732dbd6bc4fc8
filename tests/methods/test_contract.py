"""What every registered method promises, whoever wrote it. A new method adds its line to ``examples.py``."""

from __future__ import annotations

import importlib.resources
import inspect
import math
import re
from typing import Any

import annotated_types
import numpy as np
import pytest
import torch

from mergekit_lr.method import Method, Slicing, Space
from mergekit_lr.recipe import load_recipe

from .examples import CASES, EXAMPLES, METHODS, UNANIMOUS, Example, apply, bases, inputs

SHAPES = [(), (1,), (7,), (0,), (3, 5), (1, 1), (300, 257), (2, 3, 50_001), (131_072 + 17,)]


def merged(method: str, example: Example, tensors: list[torch.Tensor], base: Any, **more: Any) -> torch.Tensor:
    shared, each = example
    return apply(METHODS[method], tensors, base, merge=shared, models=each[: len(tensors)], **more)


def ulps_bf16(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in bf16 steps after rounding; -0 equals 0."""

    def steps(x: torch.Tensor) -> torch.Tensor:
        bits = x.to(torch.bfloat16).view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((steps(a) - steps(b)).abs().max()) if a.numel() else 0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_every_method_has_examples() -> None:
    assert sorted(EXAMPLES) == sorted(METHODS)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_identical_inputs_are_given_back(name: str, i: int) -> None:
    method = METHODS[name]
    if any("scale" in m for m in EXAMPLES[name][i][1]):
        pytest.skip("a scaled copy is not a copy")
    for with_base in bases(method):
        [x, *_], _ = inputs(method, (40, 33), with_base=False)
        count = min(3, method.max_models or 3)
        out = merged(name, EXAMPLES[name][i], [x] * count, x if with_base else None)
        assert ulps_bf16(out, x) <= 1


@pytest.mark.parametrize("name", UNANIMOUS)
def test_models_that_agree_are_given_back_whatever_the_base(name: str) -> None:
    method = METHODS[name]
    for with_base in bases(method):
        [x, *_], base = inputs(method, (40, 33), with_base=with_base)
        out = merged(name, UNANIMOUS[name], [x] * min(3, method.max_models or 3), base)
        # base + (x - base) in fp32 may miss x by its rounding, never by more than a bf16 step
        assert ulps_bf16(out, x) <= 1


@pytest.mark.parametrize(("name", "i"), CASES)
def test_order_of_models_does_not_matter(name: str, i: int) -> None:
    method = METHODS[name]
    if method.max_models == 1:
        pytest.skip("takes one model")
    models, base = inputs(method, (40, 257), with_base=bases(method)[-1])
    shared, each = EXAMPLES[name][i]
    each = each[: len(models)]
    one = apply(method, models, base, merge=shared, models=each)
    keys = [f"model {k}" for k in range(len(models))]
    other = apply(method, models[::-1], base, merge=shared, models=each[::-1], keys=keys[::-1])
    agree = float((one - other).abs().max()) <= 1e-6 * float(one.abs().max())
    assert agree == method.commutes


@pytest.mark.parametrize(("name", "i"), CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sliced_equals_whole_to_the_bit(name: str, i: int, shape: tuple[int, ...]) -> None:
    method = METHODS[name]
    shared = method.Merge.model_validate(EXAMPLES[name][i][0])
    sizes = (1, 70_000) if method.slicing(shared) is not Slicing.ROWWISE else (1, 1_000, 120_000)
    for with_base in bases(method):
        models, base = inputs(method, shape, with_base=with_base)
        whole = merged(name, EXAMPLES[name][i], models, base)
        assert whole.shape == shape
        assert whole.dtype == torch.float32
        for most in sizes:
            assert same_bits(whole, merged(name, EXAMPLES[name][i], models, base, most=most))


@pytest.mark.parametrize(("name", "i"), CASES)
def test_threads_do_not_change_a_bit(name: str, i: int) -> None:
    method = METHODS[name]
    models, base = inputs(method, (2, 40_001), with_base=bases(method)[-1])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(merged(name, EXAMPLES[name][i], models, base))
    finally:
        torch.set_num_threads(before)
    assert same_bits(*results)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_inputs_are_not_touched(name: str, i: int) -> None:
    method = METHODS[name]
    for with_base in bases(method):
        models, base = inputs(method, (9, 31), with_base=with_base)
        models = [m.float() for m in models]  # fp32 is what pieces are views of
        base = None if base is None else base.float()
        copies = [m.clone() for m in models], None if base is None else base.clone()
        out = merged(name, EXAMPLES[name][i], models, base)
        out.fill_(7.0)
        assert all(torch.equal(a, b) for a, b in zip(models, copies[0], strict=True))
        if base is not None and copies[1] is not None:
            assert torch.equal(base, copies[1])


@pytest.mark.parametrize(("name", "i"), CASES)
def test_seed_decides_everything_random(name: str, i: int) -> None:
    method = METHODS[name]
    models, base = inputs(method, (40, 33), with_base=bases(method)[-1])
    one = merged(name, EXAMPLES[name][i], models, base, seed=5)
    assert same_bits(one, merged(name, EXAMPLES[name][i], models, base, seed=5))
    other_seed = merged(name, EXAMPLES[name][i], models, base, seed=6)
    other_name = merged(name, EXAMPLES[name][i], models, base, seed=5, name="another tensor")
    assert same_bits(one, other_seed) != method.stochastic
    assert same_bits(one, other_name) != method.stochastic


def nasty(kind: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Three models and a base that break careless arithmetic."""
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(shape, generator=generator) for _ in range(4)]
    zero = torch.zeros(shape)
    if kind == "zeros":
        return [zero] * 4
    if kind == "one model is zero":
        return [zero, *noise[1:]]
    if kind == "opposites":
        return [noise[0], -noise[0], noise[0], zero]
    if kind == "deltas cancel":
        return [noise[0] + noise[1], noise[0] - noise[1], noise[0], noise[0]]
    if kind == "all equal":
        return [torch.ones(shape)] * 4
    if kind == "huge":
        return [x.sign() * 1e30 for x in noise]
    if kind == "tiny":
        return [x * 1e-38 for x in noise]
    return [x * 10.0 ** torch.randint(-30, 30, shape, generator=generator) for x in noise]


KINDS = [
    "zeros", "one model is zero", "opposites", "deltas cancel", "all equal", "huge", "tiny", "mixed scales",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_finite_inputs_give_finite_results(name: str, i: int, kind: str) -> None:
    method = METHODS[name]
    for shape in ((), (1,), (5, 1), (1, 6), (40, 33)):
        *models, base = nasty(kind, shape)
        models = models[: min(3, method.max_models or 3)]
        for with_base in bases(method):
            out = merged(name, EXAMPLES[name][i], models, base if with_base else None)
            assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize(("name", "i"), CASES)
def test_nonfinite_inputs_show_where_promised(name: str, i: int) -> None:
    method = METHODS[name]
    if not method.exposes_nonfinite:
        pytest.skip("the engine checks this method's inputs")
    models, base = inputs(method, (40, 33), with_base=bases(method)[-1])
    for which in range(len(models)):
        for value in (math.nan, math.inf, -math.inf):
            spoilt = [m.clone() for m in models]
            spoilt[which][17, 3] = value
            out = merged(name, EXAMPLES[name][i], spoilt, base)
            assert not bool(torch.isfinite(out).all()), (which, value)


@pytest.mark.parametrize("name", METHODS)
def test_one_model_where_one_is_enough(name: str) -> None:
    method = METHODS[name]
    if method.min_models > 1:
        pytest.skip("takes more")
    for with_base in bases(method):
        models, base = inputs(method, (6, 7), with_base=with_base)
        for example in EXAMPLES[name]:
            assert bool(torch.isfinite(merged(name, example, models[:1], base)).all())


@pytest.mark.parametrize("name", METHODS)
def test_parameters_say_what_they_mean_and_what_they_allow(name: str) -> None:
    method = METHODS[name]
    for model in (method.Merge, method.PerModel):
        for key, field in model.model_fields.items():
            assert field.description, f"{name}: {key} has no description"
            kinds = {field.annotation, *getattr(field.annotation, "__args__", ())}
            if kinds & {int, float}:
                limits = [m for m in field.metadata if isinstance(m, annotated_types.BaseMetadata)]
                finite = any(getattr(m, "allow_inf_nan", None) is False for m in field.metadata)
                assert limits or finite, f"{name}: {key} takes any number, infinity and NaN too"


@pytest.mark.parametrize("name", METHODS)
def test_docstring_and_source_cite_the_paper(name: str) -> None:
    method = METHODS[name]
    text = inspect.getdoc(type(method)) or ""
    source = method.source.arxiv or method.source.url or ""
    assert source in text
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https://", text)
    assert "Source:" in text
    assert method.source.link.startswith("https://")
    assert 0 < len(method.summary) <= 110


@pytest.mark.parametrize("name", METHODS)
def test_a_ready_recipe_uses_it(name: str) -> None:
    folder = importlib.resources.files("mergekit_lr.configs")
    recipes = [p for p in folder.iterdir() if p.name.endswith(".yml")]
    used = {load_recipe(p.read_text()).merge_method: p.read_text() for p in recipes}
    assert name in used
    assert f"{name}.yml" in {p.name for p in recipes}
    head = [line for line in (folder / f"{name}.yml").read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Needs: ") for line in head)
    assert any(METHODS[name].source.link in line for line in head)


def test_ulps_count_bf16_steps() -> None:
    one = torch.ones(1)
    assert ulps_bf16(one, one * (1 + 2**-7)) == 1
    assert ulps_bf16(one, -one) > 1000
    assert ulps_bf16(torch.zeros(1), -torch.zeros(1)) == 0
    assert np.isclose(float(torch.finfo(torch.bfloat16).eps), 2**-7)


def _watched(method: Method) -> Any:
    """The method, noting the coefficients that it gives for each piece it merges."""

    class Watched(type(method)):  # type: ignore[misc]
        def merge(self, call: Any, piece: Any, state: Any) -> torch.Tensor:
            self.seen.append(self.coefficients(call, state))
            merged: torch.Tensor = super().merge(call, piece, state)
            return merged

    watched = Watched()
    watched.seen = []
    return watched


@pytest.mark.parametrize("one_is_the_base", [False, True])
@pytest.mark.parametrize(("name", "i"), CASES)
def test_coefficients_say_what_merge_does(name: str, i: int, one_is_the_base: bool) -> None:
    """A method that calls itself a linear combination must be one, even when formed from weights, not deltas."""
    method = METHODS[name]
    for with_base in bases(method):
        models, base = inputs(method, (40, 33), with_base=with_base)
        if one_is_the_base and base is not None:
            models[0] = base.clone()
        watched = _watched(method)
        shared, each = EXAMPLES[name][i]
        out = apply(watched, models, base, merge=shared, models=each[: len(models)])
        (found,) = watched.seen
        if found is None:
            continue
        want = sum(np.float32(c) * m.float() for c, m in zip(found, models, strict=True))
        if method.space(with_base) is Space.DELTA and base is not None:
            want = want + np.float32(1 - math.fsum(found)) * base.float()
        scale = max(float(m.abs().max()) for m in models)
        assert float((out - want).abs().max()) <= 16 * 2**-24 * 16 * scale
