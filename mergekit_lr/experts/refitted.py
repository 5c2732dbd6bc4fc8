"""Files of refitted layers: each holds one layer's router and experts as the output will, under their own names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.arch.moe import MoeLayer, RouterTensor, Slab
from mergekit_lr.checkpoint.dtypes import AVERAGED, torch_dtype
from mergekit_lr.checkpoint.header import read_header
from mergekit_lr.checkpoint.model import Checkpoint, open_file
from mergekit_lr.checkpoint.writer import write_safetensors
from mergekit_lr.errors import NonFiniteError
from mergekit_lr.experts.bank import Activation, ExpertBank
from mergekit_lr.experts.problem import Reduced
from mergekit_lr.experts.storage import expert_from, stored_as
from mergekit_lr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerFiles:
    """The prepared layers of one model in ``folder``; ``dtype``: safetensors code of the output, None for each own."""

    checkpoint: Checkpoint
    folder: Path
    dtype: str | None

    def path(self, layer: MoeLayer) -> Path:
        """The file of one layer."""
        return self.folder / f"{layer.block}.safetensors"

    def code(self, stored: str) -> str:
        """The dtype that experts of a stored dtype are written in."""
        return (self.dtype or stored) if stored in AVERAGED else stored

    def save(self, layer: MoeLayer, reduced: Reduced) -> None:
        """Write a layer, cast once; the file appears whole or not at all."""
        content = {r.name: self._router(r, reduced) for r in layer.router}
        bank = reduced.bank
        for s in layer.stored:
            dtype = torch_dtype(self.code(s.dtype))
            parts = [stored_as(s.slot, bank.expert(e)).to(dtype).cpu().contiguous() for e in range(bank.experts)]
            if s.slot.fused:
                content[s.names[0]] = torch.stack(parts)
            else:
                content |= dict(zip(s.names, parts, strict=False))
        for name, tensor in content.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                raise NonFiniteError(
                    f"the refitted tensor {name} has values that its dtype cannot hold",
                    where=self.checkpoint.reference,
                    fix="write another dtype, such as float32, or give more calibration text",
                )
        decided = {"kept": reduced.kept, "names": reduced.names, "notes": reduced.notes}
        shape = {"experts": bank.experts, "width": bank.width}
        write_safetensors(self.path(layer), content, {"layer": json.dumps(decided | shape, sort_keys=True)})

    def _router(self, router: RouterTensor, reduced: Reduced) -> Tensor:
        info = self.checkpoint.tensors[router.name]
        whole = self.checkpoint.read(router.name, 0, info.numel).reshape(info.shape)
        if reduced.rows is not None and whole.ndim == 2 and whole.shape[0] != 1:
            return reduced.rows.to(whole.dtype).cpu().contiguous()
        if reduced.kept is None or reduced.names is not None:
            return whole
        return whole.index_select(router.axis, torch.tensor(reduced.kept)).contiguous()

    def said(self, layer: MoeLayer) -> Mapping[str, Any] | None:
        """What is known of a layer that is done: kept, names, notes, experts and width; None for one that is not."""
        if not self.path(layer).exists():
            return None
        said: dict[str, Any] = json.loads(read_header(self.path(layer)).metadata["layer"])
        return said

    def load(self, layer: MoeLayer, activation: Activation | None = None) -> Reduced | None:
        """A layer that is done, as it was written; None for one that is not."""
        said = self.said(layer)
        if said is None:
            return None
        with open_file(self.path(layer), layer.block) as found:
            stored = tuple(replace(s, shape=s.resized(layer.width, said["width"])) for s in layer.stored)
            experts = [expert_from(stored, [_part(found, s.slab(e)) for s in stored]) for e in range(said["experts"])]
            name = layer.router[0].name
            info = found.tensors[name]
            rows = _part(found, Slab(name, 0, info.numel, info.shape)).float()
        bank = ExpertBank.of(experts) if activation is None else ExpertBank.of(experts, activation)
        kept, names = (None if said[k] is None else tuple(said[k]) for k in ("kept", "names"))
        return Reduced(bank, kept, None if kept is None or names is not None else rows, names, said["notes"])


def _part(found: Checkpoint, slab: Slab) -> Tensor:
    return found.read(slab.tensor, slab.start, slab.stop).reshape(slab.shape)
