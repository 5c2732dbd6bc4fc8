"""Indexes that do not fit their shards: always an error, or the index decides; never another file's numbers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random

import pytest

from mergekit_lr.checkpoint.model import open_folder
from mergekit_lr.errors import CheckpointError
from mergekit_lr.report.verify import verify

FILES = ("s1.safetensors", "s2.safetensors", "s3.safetensors")
NAMES = "abcd"
ODD_FILES = ("s4.safetensors", "../s1.safetensors", "s1.bin", "", None, 7, ["s1.safetensors"], "S1.safetensors")


def shard(names: list[str], value: float) -> bytes:
    """Each name twice the number ``value``."""
    entries = {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate(names)}
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + struct.pack("<f", value) * (2 * len(names))


@pytest.mark.parametrize(
    ("seed", "cases"), [(1, 300), pytest.param(2, 5_000, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_indexes(seed: int, cases: int, tmp_path: Path) -> None:
    random = Random(seed)
    sound_ones = 0
    for _ in range(cases):
        holds = {f: sorted(random.sample(NAMES, random.randrange(4))) for f in FILES}
        present = [f for f in FILES if random.random() < 0.8]
        # Mostly right, so that a good share of folders is sound.
        mapped: dict[str, object] = {n: f for f in present for n in holds[f] if random.random() < 0.9}
        for name in random.sample(NAMES, random.choice([0, 0, 1, 2])):
            mapped[name] = random.choice(FILES if random.random() < 0.7 else ODD_FILES)
        for file in FILES:
            (tmp_path / file).unlink(missing_ok=True)
        for number, file in enumerate(FILES):
            if file in present:
                (tmp_path / file).write_bytes(shard(holds[file], float(number)))
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))
        sound = bool(mapped) and all(f in present and n in holds[str(f)] for n, f in mapped.items() if f is not None)
        sound = sound and all(isinstance(f, str) for f in mapped.values())
        exact = sound and all(mapped.get(n) == f for f in present for n in holds[f])
        problems = verify(tmp_path, weights=False).problems
        # To verify, a shard must hold what the index lists and nothing else, and no file may be left over.
        assert (problems == []) == (exact and all(f in mapped.values() for f in present)), (mapped, holds, problems)
        if not sound:
            with pytest.raises(CheckpointError):
                open_folder(tmp_path, "m")
            continue
        sound_ones += 1
        with open_folder(tmp_path, "m") as checkpoint:
            assert set(checkpoint.tensors) == set(mapped)
            for name, file in mapped.items():
                assert checkpoint.read(name, 0, 2).tolist() == [float(FILES.index(str(file)))] * 2
    assert 0.2 * cases < sound_ones < 0.9 * cases
