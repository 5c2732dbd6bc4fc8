"""From a recipe's tokenizer to inputs whose token rows agree, and to the files and config that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergekit_lr.arch.tied import config_ties, tied_source
from mergekit_lr.checkpoint.dtypes import AVERAGED, ITEM_BYTES
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.errors import CheckpointError, RecipeError
from mergekit_lr.method import Method
from mergekit_lr.recipe import Recipe
from mergekit_lr.tokenizer.aligned import AlignedCheckpoint, Move, Origin
from mergekit_lr.tokenizer.axes import vocabulary_rows, vocabulary_tensors
from mergekit_lr.tokenizer.extend import Extension, extend
from mergekit_lr.tokenizer.ids import Renaming
from mergekit_lr.tokenizer.rows import Member, RowTable, make_table
from mergekit_lr.tokenizer.vocabulary import Vocabulary, read_vocabulary

SHOWN = 5


@dataclass(frozen=True)
class Tokens:
    """The output's vocabulary and what follows from it.

    ``vocabulary``: that of the model which the output's tokenizer files come from, before anything is added.
    ``config``: the output's config.json to start from, and ``renaming`` how ids of tokens in such files are called now.
    ``moved``: whether any model's rows move.
    """

    source: Checkpoint
    vocabulary: Vocabulary
    extension: Extension
    table: RowTable
    config: dict[str, Any] | None
    renaming: Renaming
    moved: bool
    warnings: tuple[str, ...] = ()
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the plan and the report."""
        return {
            "source": self.source.reference,
            "tokens": len(self.extension.ids),
            "rows": self.table.rows,
            "padding_rows": int(self.table.padding.sum()),
            "added": [t["content"] for t in self.extension.added],
            "removed": list(self.extension.removed),
            "models": {m: dict(c) for m, c in self.counts.items()},
        }


def token_lines(d: Mapping[str, Any]) -> list[str]:
    """What `Tokens.to_dict` says, in words: one line for the vocabulary, one for each model."""
    new, gone = len(d["added"]), len(d["removed"])
    made = f"{d['source']}'s tokenizer" + (f" and {new:,} tokens more" if new else "")
    made += f" without {gone:,} that have no embedding" if gone else ""
    rows = f"{d['rows']:,} rows" + (f", {d['padding_rows']:,} of them padding" if d["padding_rows"] else "")
    models = d["models"].items()
    return [f"tokens: {made}, {rows}"] + [f"  {m}: " + ", ".join(f"{n:,} {w}" for w, n in c.items()) for m, c in models]


def align(
    recipe: Recipe, inputs: Mapping[str, Checkpoint], source: Checkpoint
) -> tuple[dict[str, Checkpoint], Tokens | None]:
    """The inputs with their rows in the output's order, and what else follows; nothing changes without a ``tokenizer``.

    ``source`` is the model that the output's tokenizer comes from.

    Raises:
        CheckpointError: a model's tokenizer or embeddings cannot be told, or cannot take part.
    """
    section = recipe.tokenizer
    if section is None:
        return dict(inputs), None
    warnings: list[str] = []
    reference = inputs[str(recipe.config_source)]
    members = _members(recipe, inputs, reference, warnings)
    own = next((m for m in members if m.name == source.reference), None)
    vocabulary = own.vocabulary if own else _vocabulary_of(source)
    has_rows = own.rows if own else _own_rows(source)
    union = members if section.source == "union" else []
    extension = extend(vocabulary, has_rows, union, [r.token for r in section.tokens], source.reference)
    warnings += extension.warnings
    rows = max((*extension.ids.values(), -1)) + 1
    multiple = section.pad_to_multiple_of
    keep = own is not None and multiple is None
    rows = max(rows, own.rows if own and keep else 0) if multiple is None else -(-rows // multiple) * multiple
    base = str(recipe.base_model) if recipe.base_model else None
    table = make_table(
        extension.ids, members, base, section.tokens, rows, padding_of=own.name if own and keep else None
    )
    warnings += _remarks(table, members, extension)
    aligned: dict[str, Checkpoint] = dict(inputs)
    moving = [m for m in members if table.moves(m.name, m.rows)]
    for member in moving:
        aligned[member.name] = _aligned(member, table, inputs, reference)
    owner = next(m for m in members if m.name == reference.reference)
    foreign = source.reference != reference.reference
    renaming = Renaming(
        owner.vocabulary.ids,
        extension.ids,
        vocabulary.named if foreign else None,
        source.config if foreign else None,
    )
    config = None
    if reference.config is not None:
        config, dropped = renaming.config(reference.config, rows)
        warnings += dropped
    counts = {m.name: table.counts(m.name) for m in members}
    told = tuple(warnings)
    return aligned, Tokens(source, vocabulary, extension, table, config, renaming, bool(moving), told, counts)


def _members(
    recipe: Recipe, inputs: Mapping[str, Checkpoint], reference: Checkpoint, warnings: list[str]
) -> list[Member]:
    """Every merged model with its tokens, the one that the config comes from first."""
    names = dict.fromkeys([reference.reference, *(str(r) for r in recipe.references())])
    members: list[Member] = []
    for name in names:
        checkpoint = inputs[name]
        rows = vocabulary_rows(checkpoint)
        if rows is None:
            raise CheckpointError(
                "it is not known which of its tensors have a row for each token",
                where=name,
                why="no embeddings with a name that is known",
                fix="merge it without `tokenizer` and `tokenizer_source`, with models that share its tokenizer",
            )
        vocabulary = read_vocabulary(checkpoint)
        if vocabulary is None:
            vocabulary = _assumed(name, rows, members, warnings)
        warnings += [f"{name}: {w}" for w in vocabulary.warnings if vocabulary not in [m.vocabulary for m in members]]
        members.append(Member(name, vocabulary, rows))
    return members


def _assumed(name: str, rows: int, members: Sequence[Member], warnings: list[str]) -> Vocabulary:
    """A model without tokenizer files is taken to have the first model's tokens, if it has as many rows."""
    if not members or members[0].rows != rows:
        raise CheckpointError(
            "it has no tokenizer",
            where=name,
            why=f"its {rows} rows of embeddings cannot be told apart without one",
            fix="put the tokenizer that it was trained with into its folder",
        )
    warnings.append(f"{name}: it has no tokenizer; its rows are taken to be those of {members[0].name}")
    return members[0].vocabulary


def _vocabulary_of(source: Checkpoint) -> Vocabulary:
    found = read_vocabulary(source)
    if found is None:
        raise CheckpointError("it has no tokenizer", where=source.reference, fix="name a model that has one")
    return found


def _own_rows(source: Checkpoint) -> int | None:
    return vocabulary_rows(source) if source.tensors else None


def _remarks(table: RowTable, members: Sequence[Member], extension: Extension) -> list[str]:
    told = []
    if table.unknown:
        shown = ", ".join(repr(t) for t in table.unknown[:SHOWN])
        more = f" and {len(table.unknown) - SHOWN:,} more" if len(table.unknown) > SHOWN else ""
        told.append(f"tokens that no merged model has an embedding for get rows of zeros: {shown}{more}")
    for member in members:
        matched = int((table.own[member.name][: table.tokens] >= 0).sum())
        if 2 * matched < min(len(member.vocabulary.ids), len(extension.ids)):
            told.append(
                f"{member.name}: only {matched:,} of its {len(member.vocabulary.ids):,} tokens are tokens of the "
                "output; tokenizers of different kinds spell the same word differently (Ġword, ▁word, word)"
            )
    return told


def _aligned(
    member: Member, table: RowTable, inputs: Mapping[str, Checkpoint], reference: Checkpoint
) -> AlignedCheckpoint:
    inner = inputs[member.name]
    tensors, moves = dict(inner.tensors), {}
    files = dict(inner.files)
    wanted = dict.fromkeys(vocabulary_tensors(inner))
    heads = [n for n in vocabulary_tensors(reference) if n not in inner.tensors and _stand_in(inner, n) != n]
    for name in (*wanted, *heads):
        here = _stand_in(inner, name)
        info = inner.tensors[here]
        if info.dtype not in AVERAGED:
            raise CheckpointError(
                f"tensor {here!r} is stored as {info.dtype}, and its rows cannot be moved",
                where=member.name,
                fix="convert the checkpoint to float16, bfloat16 or float32 first",
            )
        moves[name] = _move(member, name, here, info, table, inputs)
        shape = (1, table.rows) if info.shape[0] == 1 and len(info.shape) == 2 else (table.rows, *info.shape[1:])
        nbytes = table.rows * moves[name].width * ITEM_BYTES[info.dtype]
        tensors[name] = TensorInfo(name, info.dtype, shape, info.offset, nbytes)
        files.setdefault(name, inner.files[here])
    blank = (inner.reference, inner.folder, inner.config, tensors, files, inner.stamps, inner.warnings, inner.revision)
    return AlignedCheckpoint(*blank, inner=inner, table=table, moves=moves)


def _stand_in(checkpoint: Checkpoint, name: str) -> str:
    """What a model keeps as ``name``: for a head that is tied and not stored, its embeddings."""
    if name in checkpoint.tensors or not config_ties(checkpoint.config):
        return name
    return tied_source(name, checkpoint.tensors) or name


def _move(
    member: Member, name: str, here: str, info: TensorInfo, table: RowTable, inputs: Mapping[str, Checkpoint]
) -> Move:
    width = info.numel // member.rows
    lacking = table.own[member.name] < 0
    given: list[Origin] = []
    for giver, rows in table.given.items():
        if not bool(((rows >= 0) & lacking).any()):
            continue
        checkpoint = inputs[giver]
        theirs = _stand_in(checkpoint, name)
        found = checkpoint.tensors.get(theirs)
        if found is None or found.shape[1:] != info.shape[1:]:
            shape = "no such tensor" if found is None else f"shape {list(found.shape)}"
            raise CheckpointError(
                f"tensor {name!r} needs rows of {giver}, for tokens that only it has",
                where=member.name,
                why=f"there it has {shape}, here {list(info.shape)}",
                fix="merge models of one architecture and size, or use `tokenizer_source: base`",
            )
        given.append(Origin(checkpoint, theirs, np.where(lacking, rows, -1)))
    return Move(width, Origin(inputs[member.name], here, table.own[member.name]), tuple(given))


def refuse_where_unused(recipe: Recipe, tokens: Tokens | None, kind: str) -> None:
    """Methods that lay out their own output cannot change a vocabulary on the way, and adapters have no tokenizer.

    Raises:
        RecipeError: the recipe asks for it.
    """
    asked = "tokenizer" if recipe.tokenizer else "chat_template" if recipe.chat_template else None
    origin = str(recipe.origin or "recipe")
    if kind == "adapter" and asked:
        fix = "remove it: an adapter has no tokenizer of its own"
        raise RecipeError(f"{asked}: is not used by {recipe.merge_method}", where=origin, fix=fix)
    from mergekit_lr.rewrite import Rewrite

    if recipe.tokenizer and isinstance(recipe.method, Rewrite) and recipe.method.aligns_tokens:
        why, fix = "it decides itself which tokens the output has", "remove it"
        raise RecipeError(f"tokenizer: is not used by {recipe.merge_method}", where=origin, why=why, fix=fix)
    if tokens is None or not tokens.moved:
        return
    if isinstance(recipe.method, Rewrite):
        raise RecipeError(
            f"tokenizer: {recipe.merge_method} lays out its own output and cannot move rows of tokens on the way",
            where=origin,
            why="the models' vocabularies differ from the output's",
            fix="bring them to one vocabulary first, each with a passthrough recipe that has this `tokenizer`",
        )
    companion = recipe.method.companion if isinstance(recipe.method, Method) else None
    if companion is not None and companion.layout != "gram":
        raise RecipeError(
            f"tokenizer: {recipe.merge_method} reads {companion.parameter} whose rows would not follow the tokens",
            where=origin,
            why="the models' vocabularies differ from the output's",
            fix="bring the models to one vocabulary first, with passthrough recipes, and estimate it again from text",
        )
