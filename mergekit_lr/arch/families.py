"""Permutation specs of known families, read from the YAML files beside this module, and specs that a user wrote.

A pattern of a spec is a tensor name in which ``{l}`` stands for a number, ``{s:a|b}`` for one of several words, and
``(a|b)`` for either; the axes of the tensor then say ``{l}``, ``{s-1}`` and so on for what was found. ``{*}`` counts
the parts of a stack (experts). The first pattern that fits a tensor counts. ``{last:PATTERN}`` is the largest number
found for PATTERN's only field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_lr.arch.symmetry import Draft, SymmetrySpec
from mergekit_lr.errors import CheckpointError, RecipeError

FOLDER = Path(__file__).parent / "families"
_FIELD = re.compile(r"\{([a-z]+)(?::([^}]*))?\}")
_USE = re.compile(r"\{([a-z]+)(-1)?\}")
_LAST = re.compile(r"\{last:((?:[^{}]|\{[^{}]*\})*)\}")
_KEYS = {"family", "model_types", "includes", "prefixes", "sizes"} | {
    *("groups", "tensors", "identify", "unsigned_when_present"),
}
Shapes = Mapping[str, tuple[int, ...]]


def family_names() -> list[str]:
    """Families that have a spec here."""
    return sorted(p.stem for p in FOLDER.glob("*.yml"))


@cache
def family(name: str) -> dict[str, Any]:
    """A family's spec as plain data.

    Raises:
        RecipeError: there is no such family.
    """
    path = FOLDER / f"{name}.yml"
    if not path.is_file():
        raise RecipeError(
            f"there is no permutation spec for a family {name!r}",
            fix=f"use one of {', '.join(family_names())}, or give the path of a YAML file",
        )
    return read_spec(path)


def read_spec(path: Path) -> dict[str, Any]:
    """A YAML spec, its ``includes`` resolved.

    Raises:
        RecipeError: the file cannot be read or is no spec.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text) if len(text) < 1 << 20 else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise RecipeError("cannot read the permutation spec", where=str(path), why=str(e).splitlines()[0]) from e
    if not isinstance(data, dict) or not isinstance(data.get("tensors"), dict):
        raise RecipeError("this is no permutation spec", where=str(path), why="it has no mapping `tensors`")
    unknown = sorted(set(data) - _KEYS)
    if unknown:
        raise RecipeError(
            f"unknown key {unknown[0]!r} in the permutation spec",
            where=str(path),
            fix=f"known: {', '.join(sorted(_KEYS))}",
        )
    for key in ("groups", "sizes"):
        if not isinstance(data.setdefault(key, {}), dict):
            raise RecipeError(f"`{key}` of the permutation spec must be a mapping", where=str(path))
    data.setdefault("family", path.stem)
    if "includes" in data:
        base = family(data["includes"])
        for key in ("groups", "tensors"):
            data[key] = {**data[key], **base[key]}
        data["prefixes"] = data.get("prefixes", base.get("prefixes", [""]))
    return data


def family_of(names: Iterable[str], config: Mapping[str, Any] | None) -> str | None:
    """The family of a model: by its config's ``model_type``, else the one whose patterns cover all its tensors."""
    known = {t: f for f in family_names() for t in family(f).get("model_types", [])}
    kind = (config or {}).get("model_type")
    if kind in known:
        return known[kind]
    every = list(names)
    covering = [f for f in family_names() if all(_first(_patterns(family(f)), n) for n in every)]
    return min(covering, key=lambda f: len(family(f)["tensors"]), default=None)


def build_spec(data: Mapping[str, Any], shapes: Shapes, config: Mapping[str, Any] | None, where: str) -> SymmetrySpec:
    """The spec for a model whose tensors have these shapes. ``where`` names the model in errors.

    Raises:
        CheckpointError: a tensor is covered by no pattern, or sizes do not fit.
    """
    constants = {**config_sizes(config), **{str(k): int(v) for k, v in data.get("sizes", {}).items()}}
    draft = Draft(str(data["family"]), constants=constants)
    found = {name: _first(_patterns(data), name) for name in shapes}
    missing = sorted(n for n, hit in found.items() if hit is None)
    if missing:
        raise CheckpointError(
            f"the permutation spec {draft.family} does not cover the tensor {missing[0]}",
            where=where,
            why=f"{len(missing)} of {len(shapes)} tensors fit none of its patterns",
            fix="name the right family, or write a spec in YAML (docs/matching.md); ~ for axes that stay",
        )
    _declare(draft, data, shapes, {n: hit[1] for n, hit in found.items() if hit})
    _identify(draft, data, shapes)
    stacks: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name, hit in found.items():
        assert hit is not None
        entry, fields = hit
        axes = entry if isinstance(entry, list) else entry["axes"]
        own = {} if isinstance(entry, list) else entry
        filled = [None if a is None else _fill(str(a), fields, shapes) for a in axes]
        if "stack" not in own:
            draft.add([name], shapes[name], filled, reads=own.get("reads"))
            continue
        stack = _fill(own["stack"], fields, shapes)
        stacks.setdefault((stack, fields["*"][1]), []).append((int(fields["*"][0]), name))
    for (stack, _), members in stacks.items():
        members.sort()
        if [i for i, _ in members] != list(range(len(members))):
            raise CheckpointError(f"the parts of {stack} are not numbered from 0 on", where=where, why=members[0][1])
        first = found[members[0][1]]
        assert first is not None
        entry, fields = first
        filled = [None if a is None else _fill(str(a), fields, shapes) for a in entry["axes"]]
        if len({shapes[n] for _, n in members}) > 1:
            raise CheckpointError(f"the parts of {stack} have different shapes", where=where, why=members[0][1])
        draft.add([n for _, n in members], shapes[members[0][1]], filled, stack=stack, reads=entry.get("reads"))
    return draft.finish()


def config_sizes(config: Mapping[str, Any] | None) -> dict[str, int]:
    """What a config says of heads: ``heads``, ``kv_heads``, ``per_kv``, ``head_dim``."""
    c = config or {}
    nested = c.get("text_config")
    c = nested if isinstance(nested, dict) else c

    def number(*keys: str) -> int | None:
        return next((c[k] for k in keys if type(c.get(k)) is int and c[k] > 0), None)

    heads = number("num_attention_heads", "n_head", "num_heads")
    if heads is None:
        return {}
    kv = number("num_key_value_heads") or heads
    hidden = number("hidden_size", "n_embd", "d_model")
    dim = number("head_dim", "d_kv") or (hidden // heads if hidden else None)
    return {"heads": heads, "kv_heads": kv, "per_kv": heads // kv} | ({"head_dim": dim} if dim else {})


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts, last = [], 0
    text = pattern.replace("{*}", "{star}")
    for m in _FIELD.finditer(text):
        parts.append(text[last : m.start()].replace(".", r"\."))
        parts.append(f"(?P<{m.group(1)}>{m.group(2) or chr(92) + 'd+'})")
        last = m.end()
    return re.compile("".join(parts) + text[last:].replace(".", r"\."))


def _patterns(data: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Any, list[str]]]:
    prefixes = data.get("prefixes", [""])
    return [(_compiled(str(p)), entry, prefixes) for p, entry in data["tensors"].items()]


def _bare(name: str, prefixes: list[str]) -> list[str]:
    return [name.removeprefix(p) for p in prefixes if name.startswith(p)]


def _first(patterns: list[tuple[re.Pattern[str], Any, list[str]]], name: str) -> tuple[Any, dict[str, Any]] | None:
    """The first pattern's entry that fits, and what its fields stand for."""
    for pattern, entry, prefixes in patterns:
        for bare in _bare(name, prefixes):
            m = pattern.fullmatch(bare)
            if m:
                fields: dict[str, Any] = dict(m.groupdict())
                if "star" in fields:
                    a, b = m.span("star")
                    fields["*"] = (fields.pop("star"), bare[:a] + "*" + bare[b:])
                return entry, fields
    return None


def _fill(text: str, fields: Mapping[str, Any], shapes: Shapes) -> str:
    def last(m: re.Match[str]) -> str:
        pattern = _compiled(m.group(1))
        numbers = [int(next(iter(hit.groupdict().values()))) for n in shapes if (hit := pattern.fullmatch(n))]
        return str(max(numbers, default=0))

    def use(m: re.Match[str]) -> str:
        value = str(fields[m.group(1)])
        return str(int(value) - 1) if m.group(2) else value

    return _USE.sub(use, _LAST.sub(last, text))


def _declare(draft: Draft, data: Mapping[str, Any], shapes: Shapes, fields: Mapping[str, Mapping[str, Any]]) -> None:
    """Every group that a declaration can mean, given the fields of the tensors that there are."""
    for template, said in data.get("groups", {}).items():
        said = said or {}
        needed = {m.group(1) for m in _USE.finditer(template)}
        for own in fields.values():
            if needed <= set(own):
                _declare_one(draft, _fill(template, own, shapes), said, own, shapes)
    for rule in data.get("unsigned_when_present", []):
        for name in shapes:
            for bare in _bare(name, data.get("prefixes", [""])):
                m = _compiled(rule["present"]).fullmatch(bare)
                if m:
                    draft.declared.setdefault(_fill(rule["group"], m.groupdict(), shapes), {})["signed"] = False


def _declare_one(draft: Draft, group: str, said: Mapping[str, Any], fields: Mapping[str, Any], shapes: Shapes) -> None:
    parent = said.get("parent")
    draft.declared[group] = {
        "signed": bool(said.get("signed")),
        "parent": _fill(parent, fields, shapes) if parent else None,
    }
    size = said.get("size")
    if size is not None:
        number = size if isinstance(size, int) else draft.constants.get(str(size))
        if number is None:
            raise CheckpointError(
                f"the permutation spec {draft.family} needs the size {size!r} for {group}",
                why="config.json does not say it",
                fix=f"write a spec in YAML with `sizes: {{{size}: N}}`",
            )
        draft.sizes[group] = number


def _identify(draft: Draft, data: Mapping[str, Any], shapes: Shapes) -> None:
    prefixes = data.get("prefixes", [""])
    bare = {b for n in shapes for b in _bare(n, prefixes)}
    for rule in data.get("identify", []):
        for name in sorted(bare):
            m = _compiled(rule["at"]).fullmatch(name)
            if m is None:
                continue
            absent = re.compile(_USE.sub(lambda u: m.group(u.group(1)), rule["missing"]).replace(".", r"\."))  # noqa: B023
            if not any(absent.fullmatch(b) for b in bare):
                one, other = (_fill(g, m.groupdict(), shapes) for g in rule["same"])
                draft.same[one] = other
