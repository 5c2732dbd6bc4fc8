"""Record what mergekit 0.1.5 makes of every recipe under ``recipes/``.

Runs in mergekit's environment, from the ``tests`` folder::

    $(python peer/environment.py)/python -m recorded.record

Each recipe is run as it is (``dtype: float32, out_dtype: bfloat16``; this is what is stored) and once more without
``out_dtype``, to compare mergekit's float32 result with the float64 reference far below a bf16 ulp. A recipe whose
reference disagrees is reported and nothing is written: a value that nobody can explain is not worth recording.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig, SimpleLoaderCache, plan_flat_merge
from safetensors.torch import load_file, save_file

from . import inputs, reference, resolve, values

# In units of the largest weight. The iterated and the angle methods lose more in fp32.
LOOSE = {"karcher": 2e-5, "nuslerp": 2e-5, "multislerp": 1e-5, "slerp": 1e-5, "model_stock": 5e-6}
TIGHT = 1e-6


def run_mergekit(recipe: dict[str, Any], out: Path, raw: bool) -> dict[str, torch.Tensor]:
    """Merge with mergekit in this process; models are found relative to the current folder."""
    # mergekit keeps models open by path for the whole process, and each family has a ./base.
    LoaderCache.loaders.clear()
    SimpleLoaderCache().loaders.clear()
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    with contextlib.redirect_stderr(io.StringIO()):
        if raw:
            config = RawPyTorchMergeConfig.model_validate(recipe)
            tasks = plan_flat_merge(config, str(out), tensor_union=False, tensor_intersection=False, options=options)
            Executor(tasks, math_device="cpu", storage_device="cpu").execute()
        else:
            run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(out.glob("*.safetensors")):
        state |= load_file(shard)
    return state


def worst_difference(
    recipe: dict[str, Any], loaded: dict[str, dict[str, torch.Tensor]], merged: dict[str, torch.Tensor]
) -> float:
    """Largest |mergekit - reference| over the settled entries, in units of the largest weight."""
    floating = [name for name, tensor in loaded["base"].items() if tensor.is_floating_point()]
    worst, seen = 0.0, set()
    for output in resolve.outputs(recipe, floating):
        expected = reference.merged(recipe["merge_method"], output, loaded)
        error = (merged[output.name].double() - expected.value).abs() / expected.value.abs().max().clamp(min=1e-3)
        worst = max(
            worst,
            float(error[~expected.open_choice].nan_to_num(torch.inf).amax()) if (~expected.open_choice).any() else 0.0,
        )
        seen.add(output.name)
    assert seen == {name for name, tensor in merged.items() if tensor.is_floating_point()}
    return worst


def record(name: str, scratch: Path) -> tuple[torch.Tensor, str, float]:
    """One recipe: its flat values, the digest of its layout, and the worst difference from the reference."""
    family = name.split("/")[0]
    recipe = yaml.safe_load(values.recipe_path(name).read_text())
    stored = run_mergekit(recipe, scratch / "stored", family == "raw")
    del recipe["out_dtype"]
    full = run_mergekit(recipe, scratch / "full", family == "raw")
    assert torch.equal(values.flatten(full).bfloat16(), values.flatten(stored))
    loaded = {model: inputs.tensors(family, model) for model in inputs.models(family)}
    return values.flatten(stored), values.layout_digest(stored), worst_difference(recipe, loaded, full)


def main() -> int:
    """Record every recipe; returns the number of recipes that the reference does not explain."""
    recorded: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {"mergekit": "0.1.5", "torch": torch.__version__.split("+")[0], "layout": {}, "inputs": {}}
    unexplained = 0
    with tempfile.TemporaryDirectory() as root:
        for family in inputs.FAMILIES:
            inputs.write_family(family, Path(root) / family)
            for model in inputs.models(family):
                facts["inputs"][f"{family}/{model}"] = inputs.digest(inputs.tensors(family, model))
        for name in values.recipe_names():
            family = name.split("/")[0]
            os.chdir(Path(root) / family)
            with tempfile.TemporaryDirectory() as scratch:
                recorded[name], facts["layout"][name], worst = record(name, Path(scratch))
            limit = LOOSE.get(yaml.safe_load(values.recipe_path(name).read_text())["merge_method"], TIGHT)
            unexplained += worst > limit
            print(f"{worst:9.2e} {'ok' if worst <= limit else 'UNEXPLAINED'} {name}", flush=True)
    if not unexplained:
        save_file(recorded, values.RECORDED, metadata={"facts": json.dumps(facts, sort_keys=True)})
    return unexplained


if __name__ == "__main__":
    sys.exit(main())
