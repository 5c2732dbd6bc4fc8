"""Which row of which model an output token's embedding is, for every model of a merge: mergekit's rules, as arrays.

A model keeps its own row of a token that it knows. Where it does not know one, it gets, for the merge only, the row of
the base; else of the only model that has it; else the mean of those that do; else zeros. What a recipe says of a token
goes before that. Rows without a token are padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.recipe.tokens import TokenRule
from mergekit_lr.tokenizer.vocabulary import Vocabulary

Ids: TypeAlias = NDArray[np.int64]
NONE = -1


@dataclass(frozen=True)
class Member:
    """One model's tokens: ``rows`` of its embeddings, and the ids of its tokenizer (those beyond have no row)."""

    name: str
    vocabulary: Vocabulary
    rows: int


@dataclass
class RowTable:
    """Sources of every output row. Arrays of one entry per row; `NONE` where there is no such source.

    ``own[m]``: the row of model m itself. ``given[m]``: a row of m that those without an own one are given; several of
    them are averaged, none are zeros. ``padding``: rows without a token. ``mean``: rows that are, in every model, the
    mean of its ``tokens`` first rows.
    """

    tokens: int
    own: dict[str, Ids]
    given: dict[str, Ids]
    padding: NDArray[np.bool_]
    mean: NDArray[np.bool_]
    unknown: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.padding)

    def averaged(self) -> NDArray[np.bool_]:
        """Rows for which more than one model gives one."""
        return np.asarray(sum((g >= 0).astype(np.int64) for g in self.given.values()) > 1)

    def counts(self, model: str) -> dict[str, int]:
        """Where the rows of one model come from."""
        own = self.own[model] >= 0
        lacking = ~own & ~self.mean
        several = self.averaged() & lacking
        found = {"own": int((own & ~self.padding).sum()), "own padding": int((own & self.padding).sum())}
        taken = several.copy()
        for giver, given in self.given.items():
            single = (given >= 0) & lacking & ~several
            taken |= single
            if single.any():
                found[f"from {giver}"] = int(single.sum())
        found |= {"averaged": int(several.sum()), "zero": int((lacking & ~taken).sum())}
        found["mean of all"] = int((self.mean & ~own).sum())
        return {k: n for k, n in found.items() if n or k == "own"}

    def moves(self, model: str, rows: int) -> bool:
        """Whether the model's rows, of which it has so many, are not simply the output's."""
        return rows != self.rows or not bool((self.own[model] == np.arange(self.rows)).all())


def make_table(
    tokens: Mapping[str, int],
    members: Sequence[Member],
    base: str | None,
    rules: Sequence[TokenRule],
    rows: int,
    *,
    padding_of: str | None,
) -> RowTable:
    """The table for an output with ``tokens`` (string -> id) and so many ``rows``.

    ``padding_of``: the model whose padding rows are kept, each model its own where it has one at that place; None to
    make padding rows the mean of all others.

    Raises:
        CheckpointError: a rule names a token that its model does not have.
    """
    ids = np.fromiter(tokens.values(), np.int64, len(tokens))
    has_token = np.zeros(rows, dtype=bool)
    has_token[ids] = True
    own = {m.name: _own_rows(tokens, ids, m, rows) for m in members}
    given = _given(own, base)
    table = RowTable(int(ids.max(initial=-1)) + 1, own, given, ~has_token, np.zeros(rows, dtype=bool))
    known = np.logical_or.reduce([r >= 0 for r in own.values()])
    ruled = _apply(table, tokens, members, rules)
    lost = np.flatnonzero(has_token & ~known)
    if len(lost):
        by_id = {i: t for t, i in tokens.items()}
        table.unknown = [by_id[int(i)] for i in lost if by_id[int(i)] not in ruled]
    _pad(table, members, padding_of)
    return table


def _own_rows(tokens: Mapping[str, int], ids: Ids, member: Member, rows: int) -> Ids:
    theirs = member.vocabulary.ids
    found = np.fromiter((theirs.get(t, NONE) for t in tokens), np.int64, len(tokens))
    found[found >= member.rows] = NONE  # a token that the model cannot embed
    own = np.full(rows, NONE, dtype=np.int64)
    own[ids] = found
    return own


def _given(own: Mapping[str, Ids], base: str | None) -> dict[str, Ids]:
    present = sum((r >= 0).astype(np.int64) for r in own.values())
    of_base = own[base] >= 0 if base in own and base is not None else np.zeros_like(present, dtype=bool)
    given = {}
    for name, rows in own.items():
        gives = (rows >= 0) & ((present == 1) | (of_base if name == base else ~of_base))
        given[name] = np.where(gives, rows, NONE)
    return given


def _apply(
    table: RowTable, tokens: Mapping[str, int], members: Sequence[Member], rules: Sequence[TokenRule]
) -> set[str]:
    """What the recipe says of single tokens; the tokens that it gives a source."""
    by_name = {m.name: m for m in members}
    problems: list[str] = []
    ruled: set[str] = set()
    for rule in rules:
        source, row = rule.source, tokens[rule.token]
        if source is None or (not rule.force and all(own[row] >= 0 for own in table.own.values())):
            continue
        for given in table.given.values():
            given[row] = NONE
        ruled.add(rule.token)
        if source.model is not None:
            member = by_name[str(source.model)]
            if source.kind == "model":
                found, named = int(table.own[member.name][row]), rule.token
            else:
                named = source.token if source.token is not None else str(source.token_id)
                found = source.token_id if source.token_id is not None else member.vocabulary.ids.get(named, NONE)
            if not 0 <= found < member.rows:
                problems.append(
                    f"{member.name}: it has no embedding of {named!r}, which the recipe takes for the token "
                    f"{rule.token!r} (it has {member.rows} rows); name a token that it knows"
                )
                continue
            table.given[member.name][row] = found
        if rule.force:
            for own in table.own.values():
                own[row] = NONE
    if problems:
        raise join_problems(CheckpointError, problems)
    return ruled


def _pad(table: RowTable, members: Sequence[Member], padding_of: str | None) -> None:
    places = np.flatnonzero(table.padding)
    if padding_of is None:
        table.mean[places] = True
        return
    for member in members:
        inside = places[places < member.rows]
        taken = np.fromiter(member.vocabulary.ids.values(), np.int64, len(member.vocabulary.ids))
        free = inside[~np.isin(inside, taken)]
        table.own[member.name][free] = free
        if member.name == padding_of:
            table.given[member.name][free] = free
    given = np.logical_or.reduce([g >= 0 for g in table.given.values()])
    table.mean[places] = ~given[places]
    for own in table.own.values():
        own[table.mean] = NONE
