"""How a task of a bundle is given back as a PEFT adapter: its tensors, each by a code, and its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lr.bundle.manifest import Adapters, Entry
from mergekit_lr.checkpoint.adapter import tied_embedding
from mergekit_lr.checkpoint.header import TensorInfo
from mergekit_lr.checkpoint.lora import HEAD
from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.lowrank.packing import PackCall, stored_names
from mergekit_lr.lowrank.peft import PREFIX, Described, adapter_config, architectures_of, factor_names, saved_name
from mergekit_lr.lowrank.tasks import Model, Pair


class AsAdapter:
    """Entries and configurations of every task that can be an adapter.

    Such a task has at least one change, and nothing stored whole that no adapter can hold.
    """

    def __init__(
        self, base: Checkpoint, label: str, members: Sequence[Model], calls: Mapping[str, PackCall], infos: Any
    ) -> None:
        self.base, self.label, self.calls, self.infos = base, label, calls, infos
        self.members = [m for m in members if not m.impossible and (m.pairs or m.whole)]
        self.embedding = tied_embedding(base)
        self.entries: list[Entry] = []

    def adapters(self) -> Adapters:
        for member in self.members:
            for weight, pair in member.pairs.items():
                self._pair(member, weight, pair)
            for target in member.whole:
                self._whole(member, target)
        return Adapters(tuple(self.entries), {m.name: self._config(m) for m in self.members})

    def _pair(self, member: Model, weight: str, pair: Pair) -> None:
        call = self.calls[weight]
        a, b = factor_names(pair.path, embedding=pair.embedding)
        self._factor(member, call, "A", a, turned=True)
        self._factor(member, call, "B", b, turned=False)
        if member.tied and weight == self.embedding:
            head_a, head_b = factor_names(HEAD.removesuffix(".weight"), embedding=False)
            self._factor(member, call, "A", head_b, turned=False)
            self._factor(member, call, "B", head_a, turned=True)
        if pair.magnitude is not None:
            info: TensorInfo = self.infos(pair.magnitude)
            name = f"{PREFIX}{pair.path}.lora_magnitude_vector"
            own = {member.name: (f"own/{member.name}/{weight}.magnitude",)}
            self.entries.append(Entry(name, info.dtype, info.shape, "copy", (), own))

    def _factor(self, member: Model, call: PackCall, letter: str, name: str, *, turned: bool) -> None:
        side = call.a if letter == "A" else call.b
        shape = (call.rank, side.positions) if turned else (side.positions, call.rank)
        own: dict[str, tuple[str, ...]] = {member.name: ()}
        more = {"side": [side.p, side.group], "turned": turned, "row": call.tasks.index(member.name)}
        self.entries.append(Entry(name, call.dtype, shape, "factor", stored_names(call, letter), own, call=more))

    def _whole(self, member: Model, target: str) -> None:
        info: TensorInfo = self.infos(member.whole[target])
        own = {member.name: (f"own/{member.name}/{target}",)}
        names = [saved_name(member.saved[target], member.pairs)]
        if member.tied and target == self.embedding:
            names.append(f"{PREFIX}{HEAD}")
        self.entries += [Entry(n, info.dtype, info.shape, "copy", (), own) for n in names]

    def _config(self, member: Model) -> dict[str, Any]:
        ranks = {p.path: self.calls[w].rank for w, p in member.pairs.items()}
        biases = [t for t in member.whole if t.endswith(".bias") and f"{t[:-5]}.weight" not in member.whole]
        described = Described(
            ranks=ranks,
            saved={_module(member.saved[t]) for t in member.whole if t not in biases},
            biases=bool(biases),
            fan_in_fan_out=any(p.transposed and not p.embedding for p in member.pairs.values()),
            dora=any(p.magnitude for p in member.pairs.values()),
            tied=member.tied and (self.embedding in member.pairs or self.embedding in member.whole),
            base=self.label,
            architectures=architectures_of(self.base),
        )
        return adapter_config(described, self.base.tensors)


def _module(stored: str) -> str:
    return saved_name(stored, {}).removeprefix(PREFIX).removesuffix(".weight").removesuffix(".bias")
