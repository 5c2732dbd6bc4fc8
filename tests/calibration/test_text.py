"""Windows of text: which, how many, from where; and text that cannot be used."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lr.calibration.dataset import dataset_text, is_dataset
from mergekit_lr.calibration.text import cut_windows, load_tokenizer, read_text, read_windows, sample_rows
from mergekit_lr.errors import CheckpointError, UsageError

from .families import EXAMPLE


def numbered(*counts: int) -> list[tuple[str, torch.Tensor]]:
    """Texts whose tokens say where they are: text i holds 1000 i, 1000 i + 1, ..."""
    return [(f"t{i}", 1000 * i + torch.arange(n)) for i, n in enumerate(counts)]


def test_windows_are_spread_evenly_and_whole() -> None:
    windows = cut_windows(numbered(200, 200, 25), samples=9, sequence_length=10, seed=0)
    assert Counter(windows.sources) == {0: 4, 1: 3, 2: 2}  # the third text has but two
    for ids, source in zip(windows.ids, windows.sources, strict=True):
        start = int(ids[0])
        assert ids.tolist() == list(range(start, start + 10)) and start % 10 == 0
        assert start // 1000 == source
    assert len({int(i[0]) for i in windows.ids}) == 9


@given(
    counts=st.lists(st.integers(2, 300), min_size=1, max_size=6),
    samples=st.integers(1, 20),
    length=st.integers(2, 40),
    seed=st.integers(0, 5),
)
def test_the_same_windows_for_the_same_seed(counts: list[int], samples: int, length: int, seed: int) -> None:
    texts = numbered(*counts)
    capacity = [max(1, n // length) for n in counts]
    if sum(capacity) < samples:
        with pytest.raises(CheckpointError, match="too little text"):
            cut_windows(texts, samples=samples, sequence_length=length, seed=seed)
        return
    one, two = (cut_windows(texts, samples=samples, sequence_length=length, seed=seed) for _ in range(2))
    assert one.digest == two.digest and len(one.ids) == samples
    assert one.tokens == sum(min(length, counts[s]) for s in one.sources)
    taken = Counter(one.sources)
    for i, n in taken.items():  # nobody gives two more than one that could have given more
        assert all(n <= taken[j] + 1 for j in range(len(counts)) if taken[j] < capacity[j]), (i, taken)
    held = Counter(s for s, h in zip(one.sources, one.held_out, strict=True) if h)
    assert all(held[i] == n // 2 for i, n in taken.items())


def test_the_seed_decides() -> None:
    digests = {cut_windows(numbered(4000), samples=8, sequence_length=10, seed=s).digest for s in range(5)}
    assert len(digests) == 5


def test_batches_pad_and_say_what_is_padding() -> None:
    windows = cut_windows(numbered(40, 7), samples=5, sequence_length=10, seed=0)
    [batch] = windows.batches()
    assert batch.ids.shape == (5, 10) and batch.lengths == (10, 10, 10, 10, 7)
    assert batch.valid.tolist() == [True] * 47 + [False] * 3
    assert batch.ids.reshape(-1)[~batch.valid].tolist() == [0, 0, 0]
    assert int(batch.held[batch.valid].sum()) == 20


def test_a_sample_is_of_tokens_only_and_of_the_size_asked_for() -> None:
    windows = cut_windows(numbered(40_000, 7), samples=41, sequence_length=1000, seed=0)
    batches = windows.batches()
    assert len(batches) > 5
    rows = sample_rows(windows, batches, 500, 3)
    assert sum(len(r) for r in rows) == 500
    for batch, chosen in zip(batches, rows, strict=True):
        assert bool(batch.valid[chosen].all()) and len(set(chosen.tolist())) == len(chosen)
    everything = sample_rows(windows, batches, 10**9, 3)
    assert sum(len(r) for r in everything) == windows.tokens


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word " * 100)
    tokenizer = load_tokenizer(EXAMPLE, "base")
    tokens = len(tokenizer("word " * 100, add_special_tokens=False)["input_ids"])
    with pytest.raises(CheckpointError) as caught:
        read_windows(tokenizer, [path], samples=64, sequence_length=50, seed=0)
    have = tokens // 50
    assert f"it gives {have} of 64 windows of 50 tokens" in str(caught.value)
    assert f"add about {(64 - have) * 50} tokens (" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "the text is empty"), (b" \n ", "the text is empty"), (b"\xff\xfe\x00", "not UTF-8"), (None, "cannot read")],
)
def test_texts_that_cannot_be_used(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_text(path)


def test_numbers_out_of_range_and_no_text() -> None:
    with pytest.raises(UsageError, match="samples is 0"):
        cut_windows(numbered(10), samples=0, sequence_length=5, seed=0)
    with pytest.raises(UsageError, match="sequence_length is 1"):
        cut_windows(numbered(10), samples=1, sequence_length=1, seed=0)
    with pytest.raises(UsageError, match="no text"):
        read_windows(None, [], samples=1, sequence_length=5, seed=0)


def test_what_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here").write_text("text")
    assert is_dataset("org/name") and is_dataset("org/name:config:split")
    assert not is_dataset("org/here") and not is_dataset("texts/a.txt") and not is_dataset(Path("org/name"))


def test_a_dataset_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CheckpointError, match=r"needs the package datasets.*pip install"):
        dataset_text("org/name", at_least=10)


def test_a_dataset_is_streamed_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.append((name, config, split, streaming))
        return ({"text": f"row {i}"} for i in range(1000))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert dataset_text("org/name:small:validation", at_least=15) == "row 0\n\nrow 1\n\nrow 2"
    assert asked == [("org/name", "small", "validation", True)]
    other = SimpleNamespace(load_dataset=lambda *a, **k: iter([{"code": "x"}]))
    monkeypatch.setitem(sys.modules, "datasets", other)
    with pytest.raises(CheckpointError, match=r"no column 'text'.*code"):
        dataset_text("org/name", at_least=15)
