"""A graph by layer: everything is counted once, alike layers are one block, and the picture is sound XML."""

from __future__ import annotations

import json
import struct
import xml.etree.ElementTree
from pathlib import Path

import pytest

from mergekit_lr import plan
from mergekit_lr.errors import UsageError
from mergekit_lr.graph.draw import draw
from mergekit_lr.graph.summary import OUTSIDE, Block, Row
from mergekit_lr.sizes import format_duration, parse_bandwidth

EXPERTS, HIDDEN, WIDTH = 4, 16, 8
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "vocab_size": 32,
}


def hollow(folder: Path, odd: bool = False) -> Path:
    """Headers of four layers, the first without experts; no data behind them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(4):
        layer = f"model.layers.{i}."
        shapes[f"{layer}input_layernorm.weight"] = (HIDDEN,)
        block = f"{layer}mlp."
        if i == 0:
            shapes[f"{block}up_proj.weight"] = (64, HIDDEN)
            continue
        shapes[f"{block}gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            shapes[f"{block}experts.{e}.gate_proj.weight"] = (WIDTH, HIDDEN)
            shapes[f"{block}experts.{e}.up_proj.weight"] = (WIDTH, HIDDEN)
            shapes[f"{block}experts.{e}.down_proj.weight"] = (HIDDEN, WIDTH)
    if odd:
        shapes["model.layers.2.extra.<weight>"] = (3,)
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for d in shape:
            size *= d
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def recipe(method: str, **more: object) -> dict[str, object]:
    return {"merge_method": method, "dtype": "bfloat16", **more}


def arithmetic(tmp_path: Path, *, odd: bool = False) -> dict[str, object]:
    base, a, b = (str(hollow(tmp_path / name, odd)) for name in ("base", "a", "b"))
    models = [{"model": m, "parameters": {"weight": 0.5}} for m in (a, b)]
    return recipe("task_arithmetic", base_model=base, models=models)


def test_alike_layers_are_one_block_and_experts_one_row(tmp_path: Path) -> None:
    result = plan(arithmetic(tmp_path), device="cpu")
    outside, first, rest = result.blocks
    assert (outside.title, first.title, rest.title) == (OUTSIDE, "model.layers.0", "model.layers.1 to 3")
    assert (first.layers, rest.layers) == (1, 3)
    rows = {r.kind: r for r in rest.rows}
    assert {k: r.count for k, r in rows.items()} == {
        "input_layernorm.weight": 1,
        "mlp.gate.weight": 1,
        "mlp.experts.*.gate_proj.weight": EXPERTS,
        "mlp.experts.*.up_proj.weight": EXPERTS,
        "mlp.experts.*.down_proj.weight": EXPERTS,
    }
    down = rows["mlp.experts.*.down_proj.weight"]
    assert (down.shape, down.bytes_out) == ((HIDDEN, WIDTH), EXPERTS * HIDDEN * WIDTH * 2)
    assert down.bytes_in == 3 * down.bytes_out
    assert down.action == "base + task_arithmetic(2 deltas)"
    # Everything that the plan reads and writes is in exactly one block.
    assert sum(b.bytes_in for b in result.blocks) == result.bytes_in
    assert sum(b.bytes_out for b in result.blocks) == result.layout.total_bytes
    assert [sum(b.models[i] for b in result.blocks) for i in range(3)] == [result.bytes_in // 3] * 3
    assert sum(b.layers * r.count for b in result.blocks for r in b.rows) == len(result.graph.sinks)


def test_a_layer_with_one_tensor_more_stands_alone(tmp_path: Path) -> None:
    titles = [b.title for b in plan(arithmetic(tmp_path, odd=True), device="cpu").blocks]
    assert titles == [OUTSIDE, "model.layers.0", "model.layers.1", "model.layers.2", "model.layers.3"]


def test_what_a_reduction_leaves_out_is_a_row_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    base = str(hollow(tmp_path / "base"))
    calibration = {"text": [str(tmp_path / "text.txt")], "samples": 1, "sequence_length": 8}
    wanted = recipe("reap", models=[{"model": base}], parameters={"num_experts": 3}, calibration=calibration)
    result = plan(wanted, device="cpu")
    rows = {(r.kind, r.action): r.count for r in result.blocks[-1].rows}
    assert rows["mlp.experts.*.up_proj.weight", "copied: expert kept as it was"] == 3
    assert rows["mlp.experts.*.up_proj.weight", "dropped: expert left out"] == 1
    assert sum(b.bytes_out for b in result.blocks) == result.layout.total_bytes
    assert sum(b.bytes_in for b in result.blocks) == result.bytes_in


def test_the_picture_is_xml_and_escapes_names(tmp_path: Path) -> None:
    plan(arithmetic(tmp_path, odd=True), device="cpu", graph=tmp_path / "plan.svg")
    root = xml.etree.ElementTree.parse(tmp_path / "plan.svg").getroot()
    texts = [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "extra.<weight>" in texts and f"x {EXPERTS}" in texts
    assert any(t.startswith("base + task_arithmetic") for t in texts)
    assert {e.tag.rpartition("}")[2] for e in root.iter()} == {"svg", "title", "rect", "path", "text"}


def test_no_box_lies_on_another() -> None:
    row = Row("w", 1, (2,), "F32", "copied", 8, 8)
    blocks = [Block(f"b{i}", 1, (row,) * (i + 1), (8,) * 9) for i in range(5)]
    root = xml.etree.ElementTree.fromstring(draw("t", dict.fromkeys("abcdefghi", 8), blocks, ["out"]))
    boxes = [
        tuple(float(r.attrib[k]) for k in ("x", "y", "width", "height"))
        for r in root.iter("{http://www.w3.org/2000/svg}rect")
        if "rx" in r.attrib
    ]
    assert len(boxes) == 9 + 5 + 1
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, s, t in boxes[i + 1 :]:
            assert x + w <= u or u + s <= x or y + h <= v or v + t <= y
    height = float(root.attrib["height"])
    assert all(y + h <= height for _, y, _, h in boxes)


def test_bandwidth_gives_a_time(tmp_path: Path) -> None:
    wanted = arithmetic(tmp_path)
    d = plan(wanted, device="cpu", bandwidth="1kB/s").to_dict()
    assert d["transfer_seconds"] == round((d["bytes_in"] + d["bytes_out"]) / 1000, 3)
    assert d["disk_needed"] >= d["bytes_out"] and d["disk_free"] > 0 and d["download"] == 0
    assert [b["layers"] for b in d["layers"]] == [1, 1, 3]
    assert plan(wanted, device="cpu").to_dict()["transfer_seconds"] is None


@pytest.mark.parametrize(("text", "rate"), [("2GB/s", 2 * 10**9), ("1 MiB / sec", 1 << 20), ("5GB", 5 * 10**9), (7, 7)])
def test_bandwidths(text: str | int, rate: int) -> None:
    assert parse_bandwidth(text) == rate


def test_no_bandwidth() -> None:
    for text in ("0GB/s", "fast", "2GB/min"):
        with pytest.raises(UsageError, match=r"size"):
            parse_bandwidth(text)


def test_durations() -> None:
    assert [format_duration(s) for s in (0.5, 42, 90, 600, 7200)] == ["0.5 s", "42 s", "90 s", "10 min", "2.0 h"]
