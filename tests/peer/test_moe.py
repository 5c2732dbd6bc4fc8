"""mergekit-moe itself on the same file and models: the same gates, the same experts, in another layout.

Marked ``peer``. One prompt for each expert, so that its padding (see docs/methods/moe_build.md) plays no part.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_lr import moe

from . import environment

pytestmark = pytest.mark.peer
EXAMPLES = Path(__file__).parents[2] / "examples" / "models"
LAYERS = 4


def text(mode: str) -> str:
    prompts = {"python": "def main():", "c": "int main(void) {", "german": "Die Stadt am Fluss"}
    lines = [f"base_model: {EXAMPLES / 'base'}", f"gate_mode: {mode}", "dtype: bfloat16", "experts:"]
    for name, prompt in prompts.items():
        lines += [f"  - source_model: {EXAMPLES / name}", f'    positive_prompts: ["{prompt}"]']
    return "\n".join([*lines, '    negative_prompts: ["something else"]', ""])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_the_same_mixture(tmp_path: Path, mode: str) -> None:
    config = tmp_path / "moe.yml"
    config.write_text(text(mode))
    commands = environment.ensure()
    command = [str(commands / "mergekit-moe"), str(config), str(tmp_path / "theirs"), "--device", "cpu"]
    done = subprocess.run(command, env=environment.quiet_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    moe(config, tmp_path / "ours", device="cpu")
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    for layer in range(LAYERS):
        block, packed = f"model.layers.{layer}.block_sparse_moe", f"model.layers.{layer}.mlp"
        gate, other = ours.pop(f"{block}.gate.weight").float(), theirs.pop(f"{packed}.gate.weight").float()
        # its base runs in bf16: what four layers of that may cost, and one more rounding
        assert torch.cosine_similarity(gate, other).min() > 0.999
        experts, down = theirs.pop(f"{packed}.experts.gate_up_proj"), theirs.pop(f"{packed}.experts.down_proj")
        for e in range(3):
            w1, w3, w2 = (ours.pop(f"{block}.experts.{e}.{w}.weight") for w in ("w1", "w3", "w2"))
            assert torch.equal(torch.cat([w1, w3]), experts[e])
            assert torch.equal(w2, down[e])
    theirs.pop("lm_head.weight", None)  # tied in the base; theirs may write it all the same
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())
