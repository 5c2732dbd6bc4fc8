"""Reads of moved rows against a plain gather of the whole tensor, whatever the map and the range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.tokenizer import aligned
from mergekit_lr.tokenizer.aligned import AlignedCheckpoint, Move, Origin
from mergekit_lr.tokenizer.rows import RowTable

ROWS, WIDTH = 40, 3


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Checkpoint], list[Tensor]]:
    folder, tensors, opened = tmp_path_factory.mktemp("two"), [], []
    for i, dtype in enumerate((torch.bfloat16, torch.float32)):
        tensors.append(torch.randn((ROWS, WIDTH), generator=torch.Generator().manual_seed(i)).to(dtype))
        save_file({"e": tensors[i]}, folder / f"{i}.safetensors")
        opened.append(open_file(Path(folder / f"{i}.safetensors"), str(i)))
    return opened, tensors


row = st.integers(-1, ROWS - 1)
maps = st.integers(1, 30).flatmap(lambda n: st.tuples(*(st.lists(row, min_size=n, max_size=n) for _ in range(3))))


def by_hand(tensors: list[Tensor], own: list[int], given_rows: list[list[int]], mean: list[bool]) -> Tensor:
    out = []
    for i, mine in enumerate(own):
        taken = [tensors[m][g[i]].double() for m, g in enumerate(given_rows) if g[i] >= 0]
        if mine >= 0:
            out.append(tensors[0][mine].double())
        else:
            out.append(torch.stack(taken).mean(0) if taken else torch.zeros(WIDTH).double())
    whole = torch.stack(out)
    if any(mean):
        whole[mean] = whole[[not m for m in mean]].mean(0)
    return whole


@given(maps, st.data(), st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_any_map_and_any_range(
    two: tuple[list[Checkpoint], list[Tensor]],
    found: tuple[list[int], list[int], list[int]],
    data: st.DataObject,
    near: int,
    most: int,
) -> None:
    opened, tensors = two
    own, *rest = found
    n = len(own)
    padded = data.draw(st.integers(0, n - 1))
    mean = [i >= n - padded for i in range(n)]
    own = [-1 if m else o for o, m in zip(own, mean, strict=True)]
    rest = [[-1 if m else g for g, m in zip(r, mean, strict=True)] for r in rest]
    arrays = [np.array(r, dtype=np.int64) for r in (own, *rest)]
    flags = np.array(mean)
    table = RowTable(n - padded, {"0": arrays[0]}, {"0": arrays[1], "1": arrays[2]}, flags, flags)
    move = Move(
        WIDTH,
        Origin(opened[0], "e", arrays[0]),
        tuple(Origin(c, "e", a) for c, a in zip(opened, arrays[1:], strict=True)),
    )
    base = opened[0]
    blank = (base.reference, None, None, base.tensors, base.files, base.stamps)
    before = aligned.NEAR, aligned.MOST
    aligned.NEAR, aligned.MOST = near, most
    try:
        checkpoint = AlignedCheckpoint(*blank, inner=base, table=table, moves={"e": move})
        expected = by_hand(tensors, own, rest, mean)
        a = data.draw(st.integers(0, n * WIDTH))
        b = data.draw(st.integers(a, n * WIDTH))
        got = checkpoint.read("e", a, b)
    finally:
        aligned.NEAR, aligned.MOST = before
    torch.testing.assert_close(got.double(), expected.view(-1)[a:b], rtol=1e-6, atol=1e-6)


def test_rows_that_are_only_picked_keep_their_bits(two: tuple[list[Checkpoint], list[Tensor]]) -> None:
    """The same row twice, gaps, and rows far apart: bit for bit, in the stored dtype."""
    opened, tensors = two
    rows = np.array([7, 7, 9, 0, 39, 38, -1, 8], dtype=np.int64)
    none = np.zeros(len(rows), dtype=bool)
    table = RowTable(len(rows), {"0": rows}, {}, none, none)
    base = opened[0]
    blank = (base.reference, None, None, base.tensors, base.files, base.stamps)
    checkpoint = AlignedCheckpoint(
        *blank, inner=base, table=table, moves={"e": Move(WIDTH, Origin(base, "e", rows), ())}
    )
    got = checkpoint.read("e", 0, len(rows) * WIDTH).view(-1, WIDTH)
    assert got.dtype == torch.bfloat16
    for place, row in enumerate(rows.tolist()):
        assert torch.equal(got[place], tensors[0][row] if row >= 0 else torch.zeros(WIDTH).bfloat16())
