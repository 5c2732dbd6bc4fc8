"""The streamed forward against the whole model in memory, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergekit_lr.calibration.layers import stream_layers, windows_for
from mergekit_lr.calibration.network import Network, mask_of
from mergekit_lr.calibration.probe import Routing, Watcher, by_expert, expert_output
from mergekit_lr.calibration.states import DiskStates, MemoryStates, States
from mergekit_lr.calibration.stream import Stream, exhaust
from mergekit_lr.checkpoint.model import open_folder

from . import families

Model = Callable[[str], Path]


def whole(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model as transformers loads it, experts in its own plain loop."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if hasattr(network, "set_experts_implementation"):
        network.set_experts_implementation("eager")
    return network


def layer_outputs(network: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """What every decoder layer gives, caught by hooks in one forward of the whole model."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in network.model.layers
    ]
    with torch.inference_mode():
        network(input_ids=ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", list(families.MAKERS))
def test_streamed_is_the_whole_forward_to_the_bit(model: Model, texts: list[Path], name: str) -> None:
    torch.set_num_threads(1)
    folder = model(name)
    reference = whole(folder)
    with open_folder(folder, name) as checkpoint:
        windows = windows_for(checkpoint, texts, samples=5, sequence_length=40, seed=1)
        assert len({len(i) for i in windows.ids}) == 2  # the short text is a padded window
        stream = Stream(Network(checkpoint, torch.float32, "cpu"), windows, limit=1 << 30)
        [batch] = stream.batches
        wanted = layer_outputs(reference, batch.ids, mask_of(batch.lengths, batch.ids.shape[1], torch.device("cpu")))
        states = MemoryStates(stream.batches)
        stream.embed(states)
        for index, expected in enumerate(wanted):
            with stream.network.filled(index) as layer:
                exhaust(stream.run(index, layer, states, lambda b: Watcher()))
            states.finish()
            states.advance()
            found = states.read(0)
            assert torch.equal(found.flatten(0, 1)[batch.valid], expected.flatten(0, 1)[batch.valid])
            assert all(p.is_meta for p in stream.network.layers[index].parameters())


ZOO = Path(__file__).parents[2] / "examples" / "zoo" / "build"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_streamed_is_the_whole_forward_on_the_example_models(name: str) -> None:
    folder = ZOO / name
    if not (folder / "README.md").exists():
        pytest.skip("the example mixtures are built by `python examples/zoo/build.py qwen3-moe mixtral`")
    torch.set_num_threads(1)
    reference = whole(folder)
    texts = sorted((Path(__file__).parents[2] / "examples" / "text" / "heldout").glob("*.txt"))
    with open_folder(folder, name) as checkpoint:
        windows = windows_for(checkpoint, texts, samples=64, sequence_length=256, seed=0)
        stream = Stream(Network(checkpoint, torch.float32, "cpu"), windows, limit=1 << 30)
        wanted = [layer_outputs(reference, batch.ids, None) for batch in stream.batches]
        states = MemoryStates(stream.batches)
        stream.embed(states)
        for index in range(len(stream.network.layers)):
            with stream.network.filled(index) as layer:
                exhaust(stream.run(index, layer, states, lambda b: Watcher()))
            states.finish()
            states.advance()
            for batch in stream.batches:
                assert torch.equal(states.read(batch.number), wanted[batch.number][index])


def test_bfloat16_keeps_what_the_model_keeps_in_float32(
    tmp_path_factory: pytest.TempPathFactory, texts: list[Path]
) -> None:
    torch.set_num_threads(1)
    folder = families.make_model("deepseek_v3", tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16)
    reference = whole(folder, torch.bfloat16)
    with open_folder(folder, "bf16") as checkpoint:
        windows = windows_for(checkpoint, texts[:1], samples=3, sequence_length=40, seed=1)
        network = Network(checkpoint, torch.bfloat16, "cpu")
        stream = Stream(network, windows, limit=1 << 30)
        wanted = layer_outputs(reference, stream.batches[0].ids, None)
        states = MemoryStates(stream.batches)
        stream.embed(states)
        for index, expected in enumerate(wanted):
            with network.filled(index) as layer:
                exhaust(stream.run(index, layer, states, lambda b: Watcher()))
                if index == 1:
                    assert layer.mlp.gate.weight.dtype == torch.float32
            states.finish()
            states.advance()
            assert torch.equal(states.read(0), expected)


def test_threads_and_disk_change_nothing(model: Model, texts: list[Path], tmp_path: Path) -> None:
    found = []
    with open_folder(model("qwen3_moe"), "m") as checkpoint:
        windows = windows_for(checkpoint, texts[:2] * 8, samples=160, sequence_length=120, seed=0)
        for threads, disk in ((1, False), (3, True)):
            network = Network(checkpoint, torch.float32, "cpu")
            stream = Stream(network, windows, limit=1 << 30)
            assert len(stream.batches) > 3
            stream.threads = threads
            states: States = MemoryStates(stream.batches)
            if disk:
                states = DiskStates(tmp_path, stream.batches, 32, torch.float32, -1)
            stream.embed(states)
            with network.filled(0) as layer:
                exhaust(stream.run(0, layer, states, lambda b: Watcher()))
            states.finish()
            states.advance()
            found.append(torch.cat([states.read(b.number).flatten() for b in stream.batches]))
            states.close()
    assert torch.equal(found[0], found[1])


def test_replaced_experts_reach_the_next_layer(model: Model, texts: list[Path]) -> None:
    """Replaced by themselves experts change nothing; by zeros, the next layer sees the model without them."""
    torch.set_num_threads(1)
    folder = model("qwen2_moe")
    reference = whole(folder)
    with open_folder(folder, "m") as checkpoint:
        windows = windows_for(checkpoint, texts, samples=5, sequence_length=40, seed=1)
        plain, same, none = (
            [layer.inputs.clone() for layer in _replacing(stream_layers(checkpoint, windows), how)]
            for how in ("nothing", "same", "zero")
        )
    assert torch.equal(plain[0], none[0]) and torch.equal(plain[1], same[1])
    reference.model.layers[0].mlp.experts.down_proj.data.zero_()
    [batch] = windows.batches()
    seen: list[torch.Tensor] = []
    hook = reference.model.layers[1].mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    layer_outputs(reference, batch.ids, mask_of(batch.lengths, batch.ids.shape[1], torch.device("cpu")))
    hook.remove()
    assert torch.equal(none[1], seen[0].flatten(0, 1)[batch.valid])
    assert not torch.equal(none[1], plain[1])


def _replacing(layers, how: str):
    for layer in layers:
        block = layer.block
        if how == "zero":
            layer.replace(lambda routing: torch.zeros_like(routing.inputs))
        if how == "same":

            def again(routing: Routing, block=block) -> torch.Tensor:
                out = torch.zeros_like(routing.inputs)
                for e, places, tokens in by_expert(routing.indices, block.experts.num_experts):
                    y = expert_output(block.experts, routing.inputs[tokens], e)
                    out.index_add_(0, tokens, y * routing.weights[tokens, places, None])
                return out

            layer.replace(again)
        yield layer


def test_layers_give_tokens_without_padding_and_a_split(model: Model, texts: list[Path]) -> None:
    with open_folder(model("mixtral"), "m") as checkpoint:
        windows = windows_for(checkpoint, texts, samples=7, sequence_length=40, seed=1)
        layers = list(stream_layers(checkpoint, windows))
    assert [layer.index for layer in layers] == [0, 1]
    for layer in layers:
        assert layer.prefix == f"model.layers.{layer.index}.block_sparse_moe.experts"
        assert len(layer.inputs) == len(layer.weights) == len(layer.held_out) == windows.tokens
        assert torch.equal(layer.gates.sum(1), layer.weights.sum(1))
        held = sum(len(i) for i, h in zip(windows.ids, windows.held_out, strict=True) if h)
        assert int(layer.held_out.sum()) == held > 0
