"""A model with another's tokenizer: known tokens keep their rows, new ones are combinations worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekit_lr
from mergekit_lr.errors import CheckpointError, RecipeError, ResourceError
from mergekit_lr.tokenizer.spelling import meanings
from mergekit_lr.tokenizer.vocabulary import read_folder

from ..linalg.test_pursuit import by_definition
from .models import TEXT, byte_level, read_tensors, sentence_piece, tokens_of, vocabulary, word_piece, write_model
from .test_functions import loaded
from .test_rows import E, H, pieces_of, read_report

Two = tuple[Path, Path, dict[str, int], dict[str, int]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """A model and a donor of byte-level tokenizers; the names of the special tokens differ."""
    folder = tmp_path_factory.mktemp("two")
    first = byte_level(TEXT["english"], 290, ["<|end|>"])
    other = byte_level(TEXT["python"], 285, ["<|stop|>", "<|pad|>"])
    va, vb = vocabulary(first), vocabulary(other)
    config = {"eos_token_id": va["<|end|>"]}
    a = write_model(folder / "a", first, len(va), seed=0, named={"eos_token": "<|end|>"}, config=config)
    named = {"eos_token": "<|stop|>", "pad_token": "<|pad|>"}
    theirs = {"eos_token_id": vb["<|stop|>"], "pad_token_id": vb["<|pad|>"]}
    b = write_model(folder / "b", other, len(vb), seed=1, named=named, config=theirs)
    return a, b, va, vb


def known(two: Two) -> dict[str, int]:
    """The model's row of each token that it knows, worked out from the strings: the ends are the same by name."""
    _, _, va, vb = two
    return {t: va[t] for t in vb if t in va} | {"<|stop|>": va["<|end|>"]}


def run(two: Two, out: Path, **more: Any) -> dict[str, Tensor]:
    mergekit_lr.transplant(two[0], two[1], out, device="cpu", **{"k": 5, **more})
    return read_tensors(out)


def test_omp(two: Two, tmp_path: Path) -> None:
    a, b, _, vb = two
    found = run(two, tmp_path / "out")
    rows, own, theirs = known(two), read_tensors(a), read_tensors(b)
    new = sorted(set(vb) - set(rows))
    assert len(new) > 10 and len(rows) > 200
    shared = sorted(rows, key=vb.__getitem__)
    for name in (E, H):
        assert len(found[name]) == len(vb)
        for token, row in rows.items():
            assert torch.equal(found[name][vb[token]], own[name][row])
        atoms = theirs[name][[vb[t] for t in shared]].double()
        values = own[name][[rows[t] for t in shared]].double()
        for token in new:
            taken, weights = by_definition(theirs[name][vb[token]].double(), atoms, 5)
            expected = weights @ values[taken]
            torch.testing.assert_close(found[name][vb[token]].double(), expected, rtol=1e-5, atol=1e-6)
    for name in own.keys() - {E, H}:
        assert torch.equal(found[name], own[name])


def test_files_and_ids_are_the_donors(two: Two, tmp_path: Path) -> None:
    _, b, _, vb = two
    run(two, tmp_path / "out")
    out = tmp_path / "out"
    assert tokens_of(out) == vb
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (len(vb), vb["<|stop|>"])
    assert config["pad_token_id"] == vb["<|pad|>"]
    assert (out / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()
    loaded(out)
    assert not mergekit_lr.verify(out).problems
    details = read_report(out)["details"]
    assert details["matched"] == len(known(two)) and details["approximated"] == len(vb) - len(known(two))
    assert read_report(out)["notes"][f"rows of {E}"]["misfit_mean"] > 0


def nearest(x: Tensor, atoms: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    distance = 1 - atoms @ x / (atoms.norm(dim=1) * x.norm()) if cosine else (atoms - x).norm(dim=1)
    order = distance.argsort()[:k]
    return order, distance[order]


@pytest.mark.parametrize(
    ("scheme", "cosine"),
    [
        ("distance_proportional", False),
        ("distance_proportional", True),
        ("barycentric", False),
        ("least_squares", True),
    ],
)
def test_common_interpolation(two: Two, tmp_path: Path, scheme: str, cosine: bool) -> None:
    a, b, _, vb = two
    method = {"approximation_method": "common_interpolation", "weight_scheme": scheme, "cosine_similarity": cosine}
    found = run(two, tmp_path / "out", **method)
    rows, own, theirs = known(two), read_tensors(a)[E].double(), read_tensors(b)[E].double()
    shared = sorted(rows, key=vb.__getitem__)
    atoms, values = theirs[[vb[t] for t in shared]], own[[rows[t] for t in shared]]
    for token in sorted(set(vb) - set(rows))[:6]:
        x = theirs[vb[token]]
        order, distance = nearest(x, atoms, 5, cosine)
        if scheme == "distance_proportional":
            weights = 1 - distance if cosine else 1 / distance
            weights = weights / weights.sum()
        elif scheme == "least_squares":
            weights = torch.linalg.lstsq(atoms[order].T, x[:, None]).solution[:, 0]
        else:  # eliminate the last weight: minimise |x - p_k - sum_j w_j (p_j - p_k)|
            p = atoms[order]
            part = torch.linalg.lstsq((p[:-1] - p[-1]).T, (x - p[-1])[:, None]).solution[:, 0]
            weights = torch.cat([part, 1 - part.sum(dim=0, keepdim=True)])
        torch.testing.assert_close(found[E][vb[token]].double(), weights @ values[order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["mean", "sum", "weighted_mean", "first_last"])
def test_subword(two: Two, tmp_path: Path, how: str) -> None:
    from tokenizers import Tokenizer

    a, _, va, vb = two
    found = run(two, tmp_path / "out", approximation_method="subword", subword_method=how)
    tokenizer = Tokenizer.from_file(str(a / "tokenizer.json"))
    own = read_tensors(a)
    token = "Ġself"
    assert token in vb and token not in va
    pieces = tokenizer.encode(" self", add_special_tokens=False).ids
    m = len(pieces)
    assert m > 1
    down = torch.arange(m, 0, -1).float()
    weights = {
        "mean": (torch.full((m,), 1 / m), torch.full((m,), 1 / m)),
        "sum": (torch.ones(m), torch.ones(m)),
        "weighted_mean": (down / down.sum(), down.flip(0) / down.sum()),
        "first_last": (torch.eye(m)[m - 1], torch.eye(m)[0]),
    }[how]
    for name, w in zip((E, H), weights, strict=True):
        torch.testing.assert_close(found[name][vb[token]], w @ own[name][pieces], rtol=1e-5, atol=1e-6)


def test_mean_zero_and_random(two: Two, tmp_path: Path) -> None:
    a, _, _, vb = two
    own = read_tensors(a)[E]
    new = [vb[t] for t in sorted(set(vb) - set(known(two)))]
    mean = run(two, tmp_path / "mean", approximation_method="mean")[E][new]
    torch.testing.assert_close(mean, own.mean(dim=0).expand(len(new), -1), rtol=1e-5, atol=1e-7)
    assert float(run(two, tmp_path / "zero", approximation_method="zero")[E][new].abs().max()) == 0
    drawn = [
        run(two, tmp_path / f"r{i}", approximation_method="randn", seed=seed)[E] for i, seed in enumerate((1, 1, 2))
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0][new], drawn[2][new])
    assert 0.5 < float(drawn[0][new].std() / own.std()) < 1.5
    assert len(drawn[0][new].unique(dim=0)) == len(new)


def test_the_same_bytes_whatever_the_budget(two: Two, tmp_path: Path) -> None:
    whole = mergekit_lr.transplant(two[0], two[1], tmp_path / "whole", device="cpu", k=5)
    small = mergekit_lr.transplant(
        two[0], two[1], tmp_path / "small", device="cpu", k=5, threads=2, max_memory="12MiB", shard_size="20KB"
    )
    assert [t["digest"] for t in whole.report["tensors"]] == [t["digest"] for t in small.report["tensors"]]
    with pytest.raises(ResourceError, match="allow at least --max-memory"):
        mergekit_lr.transplant(two[0], two[1], tmp_path / "none", device="cpu", k=5, max_memory="64KiB")


def test_dtype_and_tied(two: Two, tmp_path: Path) -> None:
    tokenizer = byte_level(TEXT["english"], 290, ["<|end|>"])
    tied = write_model(tmp_path / "tied", tokenizer, len(vocabulary(tokenizer)), seed=5, tied=True)
    out = mergekit_lr.transplant(tied, two[1], tmp_path / "out", device="cpu", k=5, dtype="bfloat16").out
    tensors = read_tensors(out)
    assert H not in tensors and {t.dtype for t in tensors.values()} == {torch.bfloat16}
    loaded(out)
    back = mergekit_lr.transplant(two[0], tied, tmp_path / "back", device="cpu", k=5).out
    rows = read_tensors(back)[H]
    assert len(rows) == len(vocabulary(tokenizer))


def test_alphabets(two: Two, tmp_path: Path) -> None:
    """The same word in three spellings is one token; a letter is a byte only where that is asked for."""
    a, _, va, _ = two
    pieces = sentence_piece(TEXT["english"], 310)
    ids = pieces_of(pieces)
    donor = write_model(tmp_path / "spm", pieces, 310, seed=1, named={"eos_token": "</s>"})
    out = mergekit_lr.transplant(a, donor, tmp_path / "out", device="cpu", k=5).out
    own, found = read_tensors(a)[E], read_tensors(out)[E]
    for theirs, mine in (("▁the", "Ġthe"), ("at", "at"), ("▁", "Ġ"), ("</s>", "<|end|>")):
        assert torch.equal(found[ids[theirs]], own[va[mine]]), theirs
    assert not torch.equal(found[ids["<0x7A>"]], own[va["z"]])
    loose = mergekit_lr.transplant(a, donor, tmp_path / "loose", device="cpu", k=5, byte_match="embed").out
    assert torch.equal(read_tensors(loose)[E][ids["<0x7A>"]], own[va["z"]])
    assert not torch.equal(read_tensors(loose)[H][ids["<0x7A>"]], read_tensors(a)[H][va["z"]])

    words = word_piece(TEXT["english"], 80)
    third = write_model(tmp_path / "wp", words, len(vocabulary(words)), seed=2)
    found = read_tensors(mergekit_lr.transplant(a, third, tmp_path / "w", device="cpu", k=5).out)[E]
    assert torch.equal(found[vocabulary(words)["the"]], own[va["Ġthe"]])
    assert torch.equal(found[vocabulary(words)["##t"]], own[va["t"]])


def test_letters_beyond_ascii_mean_the_same(tmp_path: Path) -> None:
    first = byte_level("über für über für", 262)
    folder = tmp_path / "m"
    folder.mkdir()
    first.save(str(folder / "tokenizer.json"))
    found = read_folder(folder)
    assert found is not None
    assert "ü".encode() in meanings(found).values()
    assert b" " in meanings(found).values()


def test_prefixes(two: Two, tmp_path: Path) -> None:
    a, _, va, vb = two
    found = run(two, tmp_path / "out", prefix_match="yes")
    token = "Ġself"
    prefix = next(token[:i] for i in range(len(token) - 1, 1, -1) if token[:i] in va)
    assert torch.equal(found[E][vb[token]], read_tensors(a)[E][va[prefix]])
    assert torch.equal(found[H][vb[token]], read_tensors(a)[H][va[prefix]])


def test_refusals(two: Two, tmp_path: Path) -> None:
    a, b, _, _ = two
    bare = write_model(tmp_path / "bare", None, 50, seed=3)
    with pytest.raises(CheckpointError, match="it has no tokenizer"):
        mergekit_lr.transplant(a, bare, tmp_path / "out", device="cpu")
    with pytest.raises(RecipeError, match="omb"):
        mergekit_lr.transplant(a, b, tmp_path / "out", device="cpu", approximation_method="omb")
    recipe = {"merge_method": "transplant", "base_model": str(a), "models": [{"model": str(b)}]}
    with pytest.raises(RecipeError, match="is not used by transplant"):
        mergekit_lr.merge(recipe | {"tokenizer_source": "base"}, tmp_path / "out", device="cpu")
    result = mergekit_lr.transplant(a, b, tmp_path / "many", device="cpu", k=100_000)
    assert any("tokens are shared, so combinations have no more" in w for w in result.report["warnings"])


def test_interrupted_transplant_goes_on(two: Two, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in the head the embeddings are not made again, and the bytes are those of one run."""
    from mergekit_lr.methods import transplant as module

    whole = mergekit_lr.transplant(two[0], two[1], tmp_path / "whole", device="cpu", k=5)
    made: list[str] = []
    plain = module.write_rows

    def failing(call: Any, *rest: Any) -> None:
        made.append(call.name)
        if call.name == H and made.count(H) == 1:
            raise OSError("no space")
        plain(call, *rest)

    monkeypatch.setattr(module, "write_rows", failing)
    with pytest.raises(OSError, match="no space"):
        mergekit_lr.transplant(two[0], two[1], tmp_path / "out", device="cpu", k=5, threads=1)
    assert not (tmp_path / "out").exists()
    again = mergekit_lr.transplant(two[0], two[1], tmp_path / "out", device="cpu", k=5, threads=1)
    assert made.count(H) == 2 and made.count(E) == 1
    assert [t["digest"] for t in again.report["tensors"]] == [t["digest"] for t in whole.report["tensors"]]
