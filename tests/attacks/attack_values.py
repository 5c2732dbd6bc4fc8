"""Weights that poison a merge: NaN, infinity, values at the edge of a dtype, packed numbers (rows 6, 11, 12)."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from staging import CONFIG, attack, header, main, merged, refused

from mergekit_lr.errors import CheckpointError, MergekitLrError, NonFiniteError

BITS = {
    "F16": (2, [0x7E00, 0x7C00, 0xFC00], 0x3C00),
    "BF16": (2, [0x7FC0, 0x7F80, 0xFF80], 0x3F80),
    "F32": (4, [0x7FC00000, 0x7F800000, 0xFF800000], 0x3F800000),
    "F64": (8, [0x7FF8000000000000, 0x7FF0000000000000, 0xFFF0000000000000], 0x3FF0000000000000),
}
PLACES = [0, 1, 7, 31, 63, 64, 127, 128, 255, 256, 300, 399]


def one_tensor(room: Path, dtype: str, item: int, values: list[int]) -> Path:
    room.mkdir()
    data = b"".join(v.to_bytes(item, "little") for v in values)
    entry = {"dtype": dtype, "shape": [len(values)], "data_offsets": [0, len(data)]}
    (room / "model.safetensors").write_bytes(header({"model.norm.weight": entry}, data))
    (room / "config.json").write_text(json.dumps({"model_type": CONFIG["model_type"]}))
    return room


@attack(11)
def poisoned(room: Path) -> str:
    """NaN and infinity, in twelve places of each dtype"""
    line, tried = "", 0
    for dtype, (item, bad, one) in BITS.items():
        sound = one_tensor(room / f"{dtype}-sound", dtype, item, [one] * 400)
        for number, place in enumerate(PLACES):
            values = [one] * 400
            values[place] = bad[number % 3]
            folder = one_tensor(room / f"{dtype}-{place}", dtype, item, values)
            out = room / f"out-{dtype}-{place}"
            line = refused(
                lambda f=folder, o=out, s=sound: merged(f, s, out=o), f"flat index {place} of 400", kind=NonFiniteError
            )
            assert str(folder) in line and "model.norm.weight" in line and not out.exists()
            tried += 1
    return f"{tried} of {tried} refused with model, tensor and index: {line}"


@attack(12)
def overflow(room: Path) -> str:
    """values that are finite in fp32 and infinite in the fp16 of the output"""
    line = ""
    for number, (value, fits) in enumerate([(65504.0, True), (65519.9, True), (65520.0, False), (1e6, False)]):
        bits = int.from_bytes(struct.pack("<f", value), "little")
        folder = one_tensor(room / str(number), "F32", 4, [bits] * 8)
        out = room / f"out{number}"
        if fits:
            report = merged(folder, out=out, out_dtype="float16")
            assert report["tensors"][0]["dtype"] == "F16"
        else:
            line = refused(
                lambda f=folder, o=out: merged(f, out=o, out_dtype="float16"), "becomes infinite", kind=NonFiniteError
            )
            assert not out.exists()
    return line


@attack(12)
def half_sums(room: Path) -> str:
    """160,000 ones in fp16, whose sum and norm are infinite in fp16 arithmetic"""
    import mergekit_lr

    folders = [one_tensor(room / str(i), "F16", 2, [0x3C00 + i] * 160_000) for i in range(3)]
    for method, extra in (("model_stock", {}), ("slerp", {"parameters": {"t": 0.5}}), ("task_arithmetic", {})):
        used = folders[1:] if method != "slerp" else folders[:2]
        recipe = {
            "merge_method": method,
            "base_model": str(folders[0]),
            "models": [
                {"model": str(f), **({"parameters": {"weight": 0.5}} if method == "task_arithmetic" else {})}
                for f in used
            ],
            **extra,
        }
        report = mergekit_lr.merge(recipe, room / f"out-{method}", device="cpu", threads=1).report
        assert 1 <= report["tensors"][0]["max_abs"] <= 1.01, report["tensors"]
    return "3 methods give values near 1"


@attack(6)
def packed(room: Path) -> str:
    """unknown, packed and quantised dtypes that would be averaged as if they were numbers"""
    line = ""
    for dtype, nbytes in (("F4", 4), ("F6_E2M3", 6), ("U4", 4), ("Q4_0", 4), ("F8_E8M0FNU", 8), ("float32", 32)):
        folder = room / dtype
        folder.mkdir()
        entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, nbytes]}
        (folder / "model.safetensors").write_bytes(header({"w": entry}, bytes(nbytes)))
        line = refused(lambda f=folder: merged(f, out=room / "out"), "which is not read", kind=CheckpointError)
    for dtype in ("U8", "I8", "I32", "F8_E4M3"):  # 4-bit pairs, scales: never averaged, whatever they are
        item = 4 if dtype == "I32" else 1
        folders = [one_tensor(room / f"{dtype}{i}", dtype, item, [1 + i] * 8) for i in range(2)]
        try:
            report = merged(*folders, out=room / f"out-{dtype}")
        except MergekitLrError:
            continue
        assert all(t["rule"].startswith("copied") for t in report["tensors"]), report["tensors"]
    return line


main(__name__)
