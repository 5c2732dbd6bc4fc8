"""The MoE layers of a checkpoint: which tensor, and which part of it, is which matrix of which expert.

Everything is read off names, shapes and config.json; no weight is read. Where config and tensors disagree there is
an error, and never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mergekit_lr.arch.moe_families import EXPERT_KEYS, TOP_K_KEYS, Family, Slot, find_family, known_families
from mergekit_lr.arch.stack import claimed_layers, language_config
from mergekit_lr.errors import CheckpointError, join_problems

FP8_BLOCK = 128
"""Rows and columns that share one scale in block-scaled FP8 checkpoints."""

COMPANIONS = ("_scale_inv", "_blocks", "_scales")
"""Endings of what stands beside, or for, a quantised tensor: FP8 block scales, MXFP4 blocks and scales."""


class Info(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Opened(Protocol):
    """What is asked of a checkpoint: its reference, config and headers."""

    @property
    def reference(self) -> str: ...
    @property
    def config(self) -> dict[str, Any] | None: ...
    @property
    def tensors(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Slab:
    """One expert's part of a tensor: elements ``start .. stop`` of it, flattened, of shape ``shape``."""

    tensor: str
    start: int
    stop: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """One kind of expert tensor as a layer has it.

    ``names``: one for each expert, or one for all. ``shape``: of one expert's part, without the axis of experts.
    ``suffix``: "" for the tensor that the slot names, else the ending of a quantised companion.
    """

    slot: Slot
    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    suffix: str = ""

    @property
    def numel(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n

    def slab(self, expert: int) -> Slab:
        """Where one expert's part lies."""
        if self.slot.fused:
            return Slab(self.names[0], expert * self.numel, (expert + 1) * self.numel, self.shape)
        return Slab(self.names[expert], 0, self.numel, self.shape)

    def resized(self, old: int, new: int) -> tuple[int, ...]:
        """Its shape when experts are ``new`` instead of ``old`` neurons wide."""
        if old == new:
            return self.shape
        if self.suffix in ("_blocks", "_scales"):
            raise ValueError("MXFP4 blocks have no width of their own")
        shape, holds = list(self.shape), len(self.slot.holds)
        axis = _width_axis(self.slot)
        if axis is None:
            return self.shape
        if self.suffix == "_scale_inv":
            shape[axis] = -(-new * holds // FP8_BLOCK)
        else:
            shape[axis] = new * holds
        return tuple(shape)


@dataclass(frozen=True, slots=True)
class RouterTensor:
    """A tensor of the router with one entry for each expert along ``axis``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    axis: int


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of a reduced layer. ``stored`` and ``expert`` (None: all, fused) or ``router`` say what it holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: Stored | None = None
    expert: int | None = None
    router: RouterTensor | None = None


@dataclass(frozen=True)
class MoeLayer:
    """One layer's router and experts as they are on disk.

    ``prefix`` names the layer (``model.layers.3``), ``block`` the part with router and experts
    (``model.layers.3.mlp``). ``router[0]`` is the matrix ``[experts, hidden]``. ``extra``: a layer for predicting
    further tokens (MTP), which transformers does not run and which must have as many experts as the others.
    """

    prefix: str
    index: int
    block: str
    family: Family
    experts: int
    width: int
    hidden: int
    router: tuple[RouterTensor, ...]
    stored: tuple[Stored, ...]
    extra: bool = False

    @property
    def quantised(self) -> str:
        """``fp8``, ``mxfp4``, or "" for experts in plain floating point."""
        endings = {s.suffix for s in self.stored}
        return "mxfp4" if "_blocks" in endings else "fp8" if "_scale_inv" in endings else ""

    @property
    def names(self) -> frozenset[str]:
        """Every tensor of this layer that a change of the expert count changes."""
        return frozenset([r.name for r in self.router] + [n for s in self.stored for n in s.names])

    def slabs(self, expert: int) -> tuple[Slab, ...]:
        """All that one expert consists of, in the order of ``stored``."""
        return tuple(s.slab(expert) for s in self.stored)

    def expert_numel(self) -> int:
        """Elements of one expert as stored, scales of quantised ones included."""
        return sum(s.numel for s in self.stored)

    def outputs(self, experts: int | None = None, width: int | None = None) -> Iterator[OutputTensor]:
        """The tensors of this layer with another number, or another width, of experts, in the base's own layout."""
        count, wide = experts or self.experts, width or self.width
        for r in self.router:
            shape = tuple(count if i == r.axis else d for i, d in enumerate(r.shape))
            yield OutputTensor(r.name, r.dtype, shape, router=r)
        for s in self.stored:
            shape = s.resized(self.width, wide)
            if s.slot.fused:
                yield OutputTensor(s.names[0], s.dtype, (count, *shape), stored=s)
                continue
            for e in range(count):
                yield OutputTensor(s.names[e], s.dtype, shape, stored=s, expert=e)


def _width_axis(slot: Slot) -> int | None:
    """The axis of one expert's part that counts neurons; None where none does (the bias of down)."""
    down = slot.holds == ("down",)
    if slot.bias:
        return None if down else 0
    return 1 if down != slot.transposed else 0


def family_of(config: Mapping[str, Any] | None, tensors: Mapping[str, Any], reference: str) -> Family:
    """The family that a checkpoint belongs to.

    Raises:
        CheckpointError: there is no config, the model is dense, or its family is not known.
    """
    if config is None:
        raise CheckpointError(
            "has no config.json",
            where=reference,
            why="the expert count, the router's rule and the family are in it",
            fix="name the model's folder instead of a bare weight file",
        )
    section = language_config(config)
    model_type = str(section.get("model_type") or config.get("model_type") or "")
    family = find_family(model_type)
    if family is not None:
        return family
    if not any(k in section for k in EXPERT_KEYS) and not any("experts" in n for n in tensors):
        raise _dense(reference, f"model_type {model_type!r}, and neither config nor tensors speak of experts")
    raise CheckpointError(
        f"the MoE family {model_type!r} is not known",
        where=reference,
        why=f"known are {known_families()}",
        fix="describe it as a Family in mergekit_lr/arch/moe_families.py, or register_family one from a plug-in",
    )


def _dense(reference: str, why: str) -> CheckpointError:
    return CheckpointError(
        "is a dense model: there are no experts to reduce",
        where=reference,
        why=why,
        fix="give a mixture of experts, or use another merge_method",
    )


def moe_layers(checkpoint: Opened) -> tuple[MoeLayer, ...]:
    """Every MoE layer of a checkpoint, in order, layers for further tokens (MTP) last.

    Raises:
        CheckpointError: dense model, unknown family, or tensors and config that disagree (all found are listed).
    """
    family = family_of(checkpoint.config, checkpoint.tensors, checkpoint.reference)
    assert checkpoint.config is not None  # or family_of had raised
    pattern = re.compile(rf"(?P<layer>(?:.*\.)?layers\.(?P<index>\d+))\.{re.escape(f'{family.block}.{family.router}')}")
    found = [m for m in map(pattern.fullmatch, checkpoint.tensors) if m]
    if not found:
        name = f"layers.N.{family.block}.{family.router}"
        raise _dense(checkpoint.reference, f"no tensor is named {name} as routers of {family.name} are")
    depth = claimed_layers(checkpoint.config)
    blocks = _by_block(checkpoint.tensors, [f"{m['layer']}.{family.block}." for m in found])
    layers, problems = [], []
    for m in found:
        prefix, index = m["layer"], int(m["index"])
        extra = prefix.startswith("mtp.") or ".mtp." in prefix or (depth is not None and index >= depth)
        try:
            inside = blocks[f"{prefix}.{family.block}."]
            layers.append(_layer(family, prefix, index, inside, checkpoint.tensors, extra=extra))
        except _Misfit as e:
            problems.append(f"{checkpoint.reference}: {e}")
    layers.sort(key=lambda layer: (layer.extra, layer.index))
    if not problems:
        problems = [f"{checkpoint.reference}: {p}" for p in _against_config(layers, checkpoint.config)]
    if problems:
        raise join_problems(CheckpointError, problems)
    return tuple(layers)


class _Misfit(Exception):
    """Tensors of a layer that do not fit its family."""


def _by_block(tensors: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, list[str]]:
    """The tensors below each prefix, in one look at all names."""
    out: dict[str, list[str]] = {p: [] for p in prefixes}
    lengths = {len(p) for p in prefixes}
    for name in tensors:
        for n in lengths:
            if name[:n] in out:
                out[name[:n]].append(name)
    return out


def _layer(
    family: Family, prefix: str, index: int, inside: Sequence[str], tensors: Mapping[str, Info], *, extra: bool
) -> MoeLayer:
    block = f"{prefix}.{family.block}"
    router = tensors[f"{block}.{family.router}"]
    if len(router.shape) != 2:
        raise _Misfit(f"the router {block}.{family.router} is {list(router.shape)}, not [experts, hidden]")
    count, hidden = router.shape
    rows = [RouterTensor(f"{block}.{family.router}", router.dtype, router.shape, 0)]
    for r in family.router_rows:
        info = tensors.get(f"{block}.{r.name}")
        if info is None:
            continue
        if len(info.shape) <= r.axis or info.shape[r.axis] != count:
            raise _Misfit(f"{block}.{r.name} is {list(info.shape)} where the router has {count} rows")
        rows.append(RouterTensor(f"{block}.{r.name}", info.dtype, info.shape, r.axis))
    stored = [s for slot in family.slots for s in _stored(slot, block, count, tensors)]
    width = _width(stored, block, hidden)
    taken = {r.name for r in rows} | {n for s in stored for n in s.names}
    beside = tuple(f"{block}.{b}" for b in family.beside)
    left = [n for n in inside if n not in taken and not n.startswith(beside or ("\0",))]
    if left:
        raise _Misfit(f"{left[0]} (and {len(left) - 1} more) is not among the tensors that {family.name} has")
    return MoeLayer(prefix, index, block, family, count, width, hidden, tuple(rows), tuple(stored), extra)


def _stored(slot: Slot, block: str, count: int, tensors: Mapping[str, Info]) -> Iterator[Stored]:
    """A slot's tensors and their quantised companions."""
    stem = f"{block}.{slot.name}"
    kinds = [s for s in ("", *COMPANIONS) if stem.format(e=0) + s in tensors]
    if "" not in kinds and "_blocks" not in kinds:
        raise _Misfit(f"{stem.format(e=0)} is missing")
    if not slot.fused and count > len(tensors):  # rows can be had for nothing: a shape [10^13, 0] holds no byte
        raise _Misfit(f"the router has {count} rows, but there are {len(tensors)} tensors in all")
    for suffix in kinds:
        names = (stem + suffix,) if slot.fused else tuple(stem.format(e=e) + suffix for e in range(count))
        absent = [n for n in names if n not in tensors]
        if absent:
            raise _Misfit(f"the router has {count} rows, but {absent[0]} is missing")
        infos = [tensors[n] for n in names]
        shape = infos[0].shape[1:] if slot.fused else infos[0].shape
        if slot.fused and infos[0].shape[:1] != (count,):
            raise _Misfit(f"the router has {count} rows, but {names[0]} is {list(infos[0].shape)}")
        odd = [n for n, i in zip(names, infos, strict=True) if (i.shape, i.dtype) != (infos[0].shape, infos[0].dtype)]
        if odd:
            i = tensors[odd[0]]
            raise _Misfit(f"{odd[0]} is {i.dtype} {list(i.shape)}, and expert 0 {infos[0].dtype} {list(shape)}")
        yield Stored(slot, names, infos[0].dtype, tuple(shape), suffix)


def _width(stored: Sequence[Stored], block: str, hidden: int) -> int:
    """Neurons of an expert, the same in every matrix; or `_Misfit`."""
    widths: dict[int, str] = {}
    for s in stored:
        axis = _width_axis(s.slot)
        if s.suffix == "_blocks":  # [out, in / 32, 16]: two values a byte
            down = s.slot.holds == ("down",)
            n = s.shape[1] * 32 if down else s.shape[0] // len(s.slot.holds)
            widths.setdefault(n, s.names[0])
        elif not s.suffix and axis is not None:
            sizes = (hidden,) if not s.slot.bias else ()
            if len(s.shape) != 1 + len(sizes) or (sizes and s.shape[1 - axis] != hidden):
                raise _Misfit(f"{s.names[0]} is {list(s.shape)}, which does not fit the router's width {hidden}")
            widths.setdefault(s.shape[axis] // len(s.slot.holds), s.names[0])
    if len(widths) != 1:
        found = ", ".join(f"{n} says {w}" for w, n in widths.items())
        raise _Misfit(f"the experts of {block} have no one width: {found}")
    return next(iter(widths))


def _against_config(layers: Sequence[MoeLayer], config: Mapping[str, Any]) -> Iterator[str]:
    """Everything in a config that the tensors do not bear out."""
    section, first = language_config(config), layers[0]
    for layer in layers:
        if (layer.experts, layer.width, layer.hidden) != (first.experts, first.width, first.hidden):
            yield (
                f"{layer.block} has {layer.experts} experts of width {layer.width}, "
                f"{first.block} {first.experts} of {first.width}: one config.json cannot describe both"
            )
    said = {k: section[k] for k in EXPERT_KEYS if type(section.get(k)) is int}
    if not said:
        yield f"config.json has none of {', '.join(EXPERT_KEYS)}, and {first.block} has {first.experts} experts"
    for key, value in said.items():
        if value != first.experts:
            yield f"config.json says {key} {value}, but {first.block} has {first.experts} experts"
    for key in first.family.width_key:
        if section.get(key, first.width) != first.width:
            yield f"config.json says {key} {section[key]}, but the experts of {first.block} are {first.width} wide"
    k = next((section[k] for k in TOP_K_KEYS if type(section.get(k)) is int), None)
    if k is not None and k > first.experts:
        yield f"config.json sends a token to {k} of {first.experts} experts"
