"""The small files of an output: its config, the tokenizer, what else is carried over; and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_lr.checkpoint.dtypes import AVERAGED
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.layout import nbytes_of
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.engine.code_files import CodeFile, code_of, modules_of, refuse_taken, told_of
from mergekit_lr.engine.side_files import carried_over, merged_config
from mergekit_lr.errors import CheckpointError, join_problems
from mergekit_lr.graph.nodes import LEFT_OUT, MergeGraph
from mergekit_lr.method import Method
from mergekit_lr.recipe import Recipe
from mergekit_lr.report.consistency import PLAIN_FAMILIES, config_problems, text_config
from mergekit_lr.rewrite import Kind, Outline, Rewrite
from mergekit_lr.tokenizer.align import Tokens
from mergekit_lr.tokenizer.files import with_template, with_tokens


def output_files(
    recipe: Recipe,
    inputs: Mapping[str, Checkpoint],
    graph: MergeGraph,
    merged: Sequence[Checkpoint],
    outline: Outline | None,
    tokens: Tokens | None,
    copy_code: bool = False,
) -> tuple[bytes | None, dict[str, bytes], list[str], list[CodeFile]]:
    """The output's config, what is carried over beside it, warnings about everything that was found, and the code."""
    named = outline.tokenizer if outline is not None else None
    tokenizer = inputs[named] if named else tokens.source if tokens else merged[0]
    picked = {part: [(merged[m], layer) for m, layer in layers] for part, layers in graph.layers}
    whole = kind_of(recipe) == "model"
    dtypes = {s.dtype for s in graph.sinks if s.dtype in AVERAGED} if whole else set()
    edited = None if outline is None else outline.config
    if tokens is not None and edited is None:
        merged = [replace(merged[0], config=tokens.config), *merged[1:]]
    code = code_of(merged[0], tokenizer) if copy_code else []
    refuse_taken(code, outline.files if outline is not None else {})
    modules = modules_of(code)
    config, config_warnings = merged_config(merged[0], dtypes, picked, edited, modules)
    files, file_warnings = carried_over(merged[0], tokenizer, modules)
    files |= {c.name: c.data for c in code}
    warnings = [*recipe.warnings, *config_warnings, *file_warnings, *(tokens.warnings if tokens else ())]
    warnings += told_of(code, merged[0].reference) if copy_code else []
    if tokens is not None:
        files, token_warnings = with_tokens(files, tokens)
        warnings += token_warnings
    if recipe.chat_template is not None:
        files, template_warnings = with_template(files, recipe.chat_template, merged)
        warnings += template_warnings
    if whole:
        warnings += _contradictions(config, graph, merged[0].reference)
    if isinstance(recipe.method, Method):
        warnings += recipe.method.remarks([o.call for o in graph.operations if o.method == recipe.method.name])
    for checkpoint in (*merged, *(inputs[f] for f in graph.companions)):
        warnings += [f"{checkpoint.reference}: {w}" for w in checkpoint.warnings]
    lost = [d for d in graph.dropped if d[2] not in LEFT_OUT] if outline is None else []
    if lost:
        model, tensor, rule = lost[0]
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        warnings.append(f"{model}: tensor {tensor!r}{more} not merged ({rule})")
    return config, files, warnings, code


def _contradictions(config: bytes | None, graph: MergeGraph, reference: str) -> list[str]:
    """What the output's config says that its tensors do not bear out, as warnings.

    Raises:
        CheckpointError: there is such a thing, and the family is one whose layout is known for certain.
    """
    if config is None:
        return []
    content = json.loads(config)
    tensors = {s.name: TensorInfo(s.name, s.dtype, s.shape, 0, nbytes_of(s)) for s in graph.sinks}
    found = config_problems(content, tensors)
    if found and text_config(content).get("model_type") in PLAIN_FAMILIES:
        fix = "mend that config.json, or use the weights that belong to it"
        raise join_problems(CheckpointError, [f"{reference}: {p}; {fix}" for p in found])
    return [f"the output's config.json: {p}" for p in found]


def kind_of(recipe: Recipe) -> Kind:
    """What the recipe's output is."""
    return recipe.method.kind if isinstance(recipe.method, Rewrite) else "model"
