"""Layouts against the reference library, and graphs against their own rules."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mergekit_lr.arch.layers import positions
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.layout import lay_out, nbytes_of
from mergekit_lr.errors import RecipeError
from mergekit_lr.graph.nodes import Delta, Operation, Restore, Source, sources_of
from mergekit_lr.graph.spaces import as_input, as_weight
from mergekit_lr.method import Call, Space


@dataclass(frozen=True)
class Described:
    name: str
    dtype: str
    shape: tuple[int, ...]


TENSORS = st.lists(
    st.tuples(
        st.sampled_from(["BF16", "F32", "F64", "BOOL", "I64", "F16"]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=20,
)


@given(TENSORS, st.integers(1, 500))
def test_written_layouts_are_read_back_by_the_reference_library(tmp_path_factory, described, shard_size):
    tensors = [Described(f'layer.{i}.ünïcode "quoted"', d, s) for i, (d, s) in enumerate(described)]
    layout = lay_out(tensors, shard_size)
    folder: Path = tmp_path_factory.mktemp("layout")
    by_name = {t.name: t for t in tensors}
    for number, shard in enumerate(layout.shards):
        path = folder / shard.file
        data = bytearray(shard.size)
        data[: len(shard.header)] = shard.header
        for name, place in layout.places.items():
            if place.shard == number:
                assert place.nbytes == nbytes_of(by_name[name])
                data[place.offset : place.offset + place.nbytes] = bytes([len(name) % 2]) * place.nbytes
        path.write_bytes(data)
        assert set(read_header(path).tensors) == {n for n, p in layout.places.items() if p.shard == number}
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                assert tuple(f.get_tensor(name).shape) == by_name[name].shape
        sizes = [p.nbytes for p in layout.places.values() if p.shard == number]
        assert len(sizes) == 1 or sum(sizes) <= shard_size
    for place, t in ((layout.places[t.name], t) for t in tensors):
        width = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "BOOL": 1}[t.dtype]
        assert place.offset % width == 0  # aligned to its own element


def test_index_lists_every_tensor_once():
    tensors = [Described(f"t{i}", "F32", (10,)) for i in range(5)]
    layout = lay_out(tensors, 80)
    index = json.loads(layout.index(50) or b"")
    assert index["metadata"] == {"total_parameters": 50, "total_size": 200}
    assert [index["weight_map"][f"t{i}"] for i in range(5)] == [
        "model-00001-of-00003.safetensors",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    assert lay_out(tensors, 1000).index(50) is None


def test_positions_follow_the_layers():
    names = ["embed.weight", "lm_head.weight", "model.norm.weight"]
    names += [f"model.layers.{i}.mlp.experts.{e}.w1.weight" for i in range(5) for e in range(9)]
    names += ["vision.blocks.0.w"]
    found = positions(names)
    assert [found[n] for n in names[:3]] == [0, 0, 0]
    assert [found[f"model.layers.{i}.mlp.experts.7.w1.weight"] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert found["vision.blocks.0.w"] == 1  # the only layer of its stack


def operation(space: Space) -> Operation:
    call = Call("w", (2,), None, (), has_base=space is Space.DELTA)
    return Operation("ties", call, (Source(1, "w"),), None, space)


def test_spaces_are_converted_or_refused():
    value, base = Source(1, "w"), Source(0, "w")
    assert as_input(value, Space.WEIGHT, base) == value
    assert as_input(value, Space.DELTA, base) == Delta(value, base)
    with pytest.raises(RecipeError, match="base_model"):
        as_input(value, Space.DELTA, None)
    with pytest.raises(RecipeError, match="factor"):
        as_input(value, Space.FACTOR, base)
    assert as_weight(operation(Space.WEIGHT), None) == operation(Space.WEIGHT)
    restored = as_weight(operation(Space.DELTA), base)
    assert restored == Restore(operation(Space.DELTA), base)
    assert sources_of(restored) == [base, value]
    with pytest.raises(RecipeError, match="delta cannot be written as weights"):
        as_weight(operation(Space.DELTA), None)


def test_budget_is_kept_or_refused_before_anything_is_read(make, random_tensors, tmp_path):
    from mergekit_lr import plan
    from mergekit_lr.errors import ResourceError

    shapes = {"w.weight": (1000, 2000)}
    models = [str(make(f"m{i}", random_tensors(i, shapes=shapes))) for i in range(2)]
    recipe = {
        "merge_method": "nuslerp",
        "models": [{"model": m, "parameters": {"weight": 0.5}} for m in models],
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    }
    with pytest.raises(ResourceError, match=r"'w.weight' must be held whole.*8 MiB allowed.*--max-memory") as e:
        plan(recipe, device="cpu", max_memory="8MiB")
    enough = str(e.value).rsplit("--max-memory ", 1)[1]
    assert plan(recipe, device="cpu", max_memory=enough, threads=1).budget.peak <= int(enough[:-3]) << 20
    recipe["parameters"] = {}
    for limit in ("8MiB", "64MiB", "1GiB"):
        laid_out = plan(recipe, device="cpu", max_memory=limit, threads=4)
        assert laid_out.budget.peak <= laid_out.budget.limit
    assert plan(recipe, device="cpu", max_memory="1GiB", threads=4).budget.threads == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_units_and_pieces_of_any_sizes_cover_every_element(make, random_tensors, tmp_path, load, monkeypatch, dtype):
    """Chunks smaller than a piece, pieces smaller than a chunk, neither a multiple of the tensor."""
    from mergekit_lr import merge
    from mergekit_lr.engine import digest, memory, units

    models = [str(make(f"m{i}", random_tensors(i, dtype, {"w.weight": (333, 1001)}))) for i in range(2)]
    entries = [{"model": m, "parameters": {"weight": 0.5}} for m in models]
    for chunk, piece in ((1 << 20, 1 << 16), (1 << 20, 1 << 18), (1 << 19, 1 << 30)):
        for module in (digest, units):
            monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(memory, "PIECE", piece)
        out = tmp_path / f"{chunk}-{piece}"
        merge({"merge_method": "linear", "models": entries}, out, device="cpu")
        a, b, got = (load(folder)["w.weight"].double() for folder in (Path(models[0]), Path(models[1]), out))
        torch.testing.assert_close(got, (a + b) / 2, rtol=2**-8, atol=1e-9)


def test_bf16_survives_every_shape(make, tmp_path, load):
    """Scalars, empty tensors and vectors are merged like everything else."""
    from mergekit_lr import merge

    def tensors(x: float) -> dict[str, torch.Tensor]:
        return {
            "scalar": torch.tensor(x).bfloat16(),
            "empty": torch.zeros(0, 5).bfloat16(),
            "vector": torch.full((3,), x).bfloat16(),
            "cube": torch.full((2, 3, 4), x).bfloat16(),
        }

    models = [str(make(f"m{i}", tensors(x))) for i, x in enumerate((1.0, 3.0))]
    entries = [{"model": m, "parameters": {"weight": 0.5, "density": 0.5}} for m in models[1:]]
    for method in ("task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs"):
        merge({"merge_method": method, "base_model": models[0], "models": entries}, tmp_path / method, device="cpu")
        got = load(tmp_path / method)
        assert {n: tuple(t.shape) for n, t in got.items()} == {n: tuple(t.shape) for n, t in tensors(1).items()}
    assert load(tmp_path / "task_arithmetic")["scalar"].item() == 2.0
