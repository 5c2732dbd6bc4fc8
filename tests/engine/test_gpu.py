"""The same merges on a GPU: the CPU's numbers, and the same bytes every time."""

from __future__ import annotations

import pytest
import torch

from mergekit_lr import merge

pytestmark = pytest.mark.gpu

PER_MODEL = {"weight": 0.5, "density": 0.4}
CASES = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": PER_MODEL,
    "dare_ties": PER_MODEL,
    "dare_linear": PER_MODEL,
    "della": PER_MODEL,
    "breadcrumbs": PER_MODEL,
    "model_stock": {},
    "sce": {},
}


@pytest.mark.parametrize("method", CASES)
def test_a_gpu_gives_the_numbers_of_the_cpu(method, make, random_tensors, tmp_path, load):
    shapes = {"model.layers.0.w.weight": (700, 300), "x.weight": (513, 129), "norm.weight": (129,)}
    models = [str(make(f"m{i}", random_tensors(i, shapes=shapes))) for i in range(3)]
    entries = [{"model": m, "parameters": CASES[method]} if CASES[method] else {"model": m} for m in models[1:]]
    recipe = {"merge_method": method, "base_model": models[0], "models": entries, "dtype": "float32"}
    for name, device in (("cpu", "cpu"), ("gpu", "cuda"), ("again", "cuda")):
        merge(recipe, tmp_path / name, device=device)
    cpu, gpu, again = (load(tmp_path / n) for n in ("cpu", "gpu", "again"))
    for name in cpu:
        assert torch.equal(gpu[name], again[name])
        torch.testing.assert_close(gpu[name], cpu[name], rtol=1e-5, atol=1e-6)
