"""Transplant: a model with another model's tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.graph.nodes import Task
from mergekit_lr.lazy import torch
from mergekit_lr.method import Base, Parameters, Source, parameter
from mergekit_lr.recipe import Recipe
from mergekit_lr.rewrite import Desk, Outline, Rewrite
from mergekit_lr.tokenizer import approximate
from mergekit_lr.tokenizer.rows import Ids
from mergekit_lr.tokenizer.spelling import cut_tokens, piece_weights
from mergekit_lr.tokenizer.transplanting import LACKING, Made, Rows, keys_of, open_pair, outline_of, write_rows

if TYPE_CHECKING:
    from torch import Tensor

Where = Literal["no", "embed", "lm_head", "yes"]


class Transplant(Rewrite):
    r"""Give a model (``base_model``) the tokenizer of another, the donor, without training.

    Row d of the output's embeddings stands for the donor's token d. Where the model knows the same token, it is the
    model's own row. Else, with X the donor's rows of the tokens that both know (``[n, D]``), Y the model's rows of
    them (``[n, E]``) and x the donor's row of the new token, a sparse combination of X that gives x gives the new row:

        x ~ sum_{j in S} c_j X_j,  |S| <= k          y = sum_{j in S} c_j Y_j

    S and c are found by orthogonal matching pursuit (`mergekit_lr.linalg.pursuit`). Output head and embeddings are
    made so, each from its own pair; a bias of the head is 0 for new tokens. Inner products are in fp32, the rest in
    fp64, rounded once. Shared tokens are found by meaning: the word `` the`` is one token whether it is spelt ``Ġthe``
    (byte-level), ``▁the`` (SentencePiece) or ``the`` (WordPiece), and so is the end of a text.

    Source: Goddard and Fernandes Neto, Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit, 2025,
    https://arxiv.org/abs/2506.06607.
    """

    name = "transplant"
    summary = "a model with another model's tokenizer"
    source = Source("Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit", arxiv="2506.06607")
    base = Base.REQUIRED
    max_models = 1
    aligns_tokens = True
    stochastic = True

    class Merge(Parameters):
        approximation_method: Literal["omp", "common_interpolation", "subword", "mean", "zero", "randn"] = parameter(
            "omp", description="how rows of new tokens are made"
        )
        k: int = parameter(64, ge=1, description="most shared tokens in a combination")
        cosine_similarity: bool = parameter(
            False, description="common_interpolation: nearest by cosine, not by Euclidean distance"
        )
        weight_scheme: Literal["distance_proportional", "barycentric", "least_squares"] = parameter(
            "distance_proportional", description="common_interpolation: weights of the nearest"
        )
        subword_method: Literal["mean", "sum", "weighted_mean", "first_last"] = parameter(
            "mean", description="subword: how the rows of a new token's pieces are joined"
        )
        prefix_match: Where = parameter("no", description="where a new token gets the row of one that it begins with")
        byte_match: Where = parameter("no", description="where a letter and the byte of it count as the same token")

    def outline(self, recipe: Recipe, inputs: Mapping[str, Checkpoint], prepared: Path | None) -> Outline:
        merge, _ = recipe.resolve("", 0.0)
        assert isinstance(merge, Transplant.Merge)
        parameters = merge.model_dump()
        pair = open_pair(recipe, inputs, {w: parameters[w] for w in ("byte_match", "prefix_match")})
        return outline_of(
            recipe, pair, parameters, lambda head: cut_tokens(pair.own, pair.model.reference, keys_of(pair, head))
        )

    def compute(self, task: Task, desk: Desk) -> None:
        assert isinstance(task.call, Rows)
        own = desk.read(0)
        merge = self.Merge(**json.loads(task.call.parameters))
        write_rows(task.call, desk, own, _Maker(task.call, merge, desk, own))


class _Maker:
    """Rows for a batch of new tokens (ids of the donor, in ascending order)."""

    def __init__(self, call: Rows, merge: Transplant.Merge, desk: Desk, own: Tensor) -> None:
        self.call, self.merge, self.own = call, merge, own.reshape(-1, call.width)
        self.kind = merge.approximation_method
        if self.kind in ("omp", "common_interpolation"):
            shared = call.array("shared")
            self.theirs = desk.read(1)
            self.shared = self.theirs[torch.tensor(shared)]
            self.rows = torch.tensor(call.array("sources")[shared]).to(
                own.device
            )  # the model's rows of the shared tokens
        elif self.kind == "subword":
            lacking = (call.array("sources") == LACKING).nonzero()[0].tolist()
            self.pieces = dict(zip(lacking, json.loads(call.pieces), strict=True))

    def __call__(self, ids: Ids) -> Made:
        merge, count, width = self.merge, len(ids), self.call.width
        if self.kind == "zero":
            return self.own.new_zeros((count, width)), None
        if self.kind == "mean":
            return self.own.double().mean(dim=0).float().expand(count, -1), None
        if self.kind == "randn":
            seed = hashlib.sha256(f"{self.call.seed}\0{self.call.name}\0{ids[0]}".encode()).digest()
            return approximate.drawn(count, self.own, int.from_bytes(seed[:7], "little")), None
        if self.kind == "subword":
            return self._from_pieces(ids), None
        targets = self.theirs[torch.tensor(ids)]
        indices, coefficients = approximate.combination(
            targets,
            self.shared,
            method=self.kind,
            k=merge.k,
            cosine=merge.cosine_similarity,
            scheme=merge.weight_scheme,
        )
        rows = approximate.combined(self.rows[indices], coefficients, self.own)
        return rows, approximate.misfit(targets, indices, coefficients, self.shared)

    def _from_pieces(self, ids: Ids) -> Tensor:
        """The rows of the pieces that the model's tokenizer cuts each token into, joined; zeros without any."""
        out = self.own.new_zeros((len(ids), self.call.width))
        for row, i in zip(out.unbind(), ids.tolist(), strict=True):
            pieces = self.pieces[i]
            if pieces:
                weights = piece_weights(len(pieces), self.merge.subword_method, self.call.head)
                row.copy_((self.own[pieces].double() * torch.tensor(weights, device=row.device)[:, None]).sum(dim=0))
        return out
