"""Files of statistics read under the weights' names: what an entry is called, sums as matrices, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from mergekit_lr.checkpoint.companion import CompanionFile, open_companion
from mergekit_lr.errors import CheckpointError
from mergekit_lr.lazy import torch

from .conftest import seeded


def opened(path: Path, tensors: dict[str, Any], *suffixes: str, factored: bool = True) -> CompanionFile:
    save_file({n: t.contiguous() for n, t in tensors.items()}, path)
    return open_companion(str(path), suffixes or (".v", ""), what="second moments", make="make it", factored=factored)


def whole(file: CompanionFile, name: str) -> Any:
    info = file.tensors[name]
    return file.read(name, 0, info.numel).view(info.shape)


def test_sums_are_the_matrix_of_rank_one_that_has_them(tmp_path: Path) -> None:
    rows, columns = seeded(1, 2, 3).abs(), seeded(2, 2, 5).abs()
    columns *= (rows.sum(1) / columns.sum(1))[:, None]  # both are sums of one matrix
    rows[1, 2] = 0.0
    with opened(tmp_path / "f", {"w.v.row": rows, "w.v.col": columns}) as file:
        assert file.tensors["w"].shape == (2, 3, 5)
        r, c = rows.double(), columns.double()
        expected = r[:, :, None] * c[:, None, :] / r.sum(1)[:, None, None]
        assert torch.allclose(whole(file, "w").double(), expected, rtol=1e-6)
        flat = expected.reshape(-1)
        for start, stop in ((0, 1), (4, 6), (13, 17), (7, 29)):  # within a row, across rows and across matrices
            assert torch.allclose(file.read("w", start, stop).double(), flat[start:stop], rtol=1e-6)
        assert file.read("w", 7, 7).shape == (0,)


def test_where_the_sum_is_zero_so_is_the_matrix(tmp_path: Path) -> None:
    with opened(tmp_path / "f", {"w.v.row": torch.zeros(3), "w.v.col": torch.zeros(2)}) as file:
        assert torch.equal(whole(file, "w"), torch.zeros(3, 2))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_the_sums_of_a_weight_without_elements(tmp_path: Path, shape: tuple[int, int]) -> None:
    tensors = {"w.v.row": torch.ones(shape[0]), "w.v.col": torch.ones(shape[1])}
    with opened(tmp_path / "f", tensors) as file:
        assert whole(file, "w").shape == shape


def test_names_are_tried_in_order_and_each_weight_is_entered_once(tmp_path: Path) -> None:
    tensors = {
        "a.v": torch.ones(2),
        "a": torch.zeros(2),  # there is one for a already
        "b": torch.full((2,), 3.0),
        "c.v.row": torch.ones(2),  # its columns are missing
        "d.v.row": torch.ones(2),
        "d.v.col": torch.ones(2),
        "d.v": torch.full((2, 2), 7.0),  # said whole as well: the first in the file counts
        "e": torch.ones(2, dtype=torch.int64),  # no statistic
    }
    with opened(tmp_path / "f", tensors) as file:
        assert sorted(file.tensors) == ["a", "b", "d"]
        assert whole(file, "a").tolist() == [1.0, 1.0] and whole(file, "b").tolist() == [3.0, 3.0]
        assert whole(file, "d").tolist() == [[7.0, 7.0], [7.0, 7.0]]
    with opened(tmp_path / "g", tensors, factored=False) as plain:
        assert "c" not in plain.tensors and whole(plain, "d").tolist() == [[7.0, 7.0], [7.0, 7.0]]


@pytest.mark.parametrize(
    ("rows", "columns"),
    [((2, 3), (4, 5)), ((3,), (2, 5)), ((2, 3), (5,)), ((), (5,)), ((3,), ())],
    ids=["of two stacks", "rows of one", "columns of one", "no rows", "no columns"],
)
def test_sums_that_do_not_belong_together_are_refused(
    tmp_path: Path, rows: tuple[int, ...], columns: tuple[int, ...]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "f", {"w.v.row": torch.ones(rows), "w.v.col": torch.ones(columns)})
    assert caught.value.what == "the sums of 'w' do not fit each other"
    assert caught.value.why == f"rows {list(rows)}, columns {list(columns)}"
    assert str(tmp_path / "f") in str(caught.value)


def test_a_file_of_something_else_says_what_to_make(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path / "f", {"w": torch.ones(2)}, ".v")
    assert (caught.value.what, caught.value.fix) == ("holds no second moments", "make it")
    assert caught.value.why == "no entry has a name that fits"
