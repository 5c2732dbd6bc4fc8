"""What was decided about each layer, and the JSON file that it is kept in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint import fs
from mergekit_lr.experts.partition import Group, Partition
from mergekit_lr.experts.router import Row

FILE = "decision.json"


@dataclass(frozen=True)
class LayerDecision:
    """One layer: its groups, each member's share in the average, the router's new rows, and what they come from.

    ``scores``: of every old expert under the method's rule; ``routed``: calibration tokens that reached it.
    """

    block: str
    partition: Partition
    shares: tuple[tuple[float, ...], ...]
    router: tuple[Row, ...]
    scores: tuple[float, ...] = ()
    routed: tuple[int, ...] = ()

    @property
    def experts(self) -> int:
        """Experts that are left."""
        return len(self.partition.groups)

    def plain(self) -> dict[str, Any]:
        groups = [
            {"members": list(g.members), "centre": g.centre, "shares": list(s)}
            for g, s in zip(self.partition.groups, self.shares, strict=True)
        ]
        return {
            "block": self.block,
            "groups": groups,
            "dropped": list(self.partition.dropped),
            "router": [[list(pair) for pair in row] for row in self.router],
            "scores": list(self.scores),
            "routed": list(self.routed),
        }

    @staticmethod
    def from_plain(d: dict[str, Any]) -> LayerDecision:
        groups = tuple(Group(tuple(g["members"]), g["centre"]) for g in d["groups"])
        return LayerDecision(
            d["block"],
            Partition(groups, tuple(d["dropped"])),
            tuple(tuple(g["shares"]) for g in d["groups"]),
            tuple(tuple((e, s) for e, s in row) for row in d["router"]),
            tuple(d["scores"]),
            tuple(d["routed"]),
        )


@dataclass(frozen=True)
class Decision:
    """All layers in order, and remarks that a user should read."""

    layers: tuple[LayerDecision, ...]
    remarks: tuple[str, ...] = ()

    def of(self, block: str) -> LayerDecision | None:
        return next((d for d in self.layers if d.block == block), None)


def write_decision(folder: Path, decision: Decision) -> None:
    """Keep a decision; the file has its name only when it is complete."""
    content = {"layers": [d.plain() for d in decision.layers], "remarks": list(decision.remarks)}
    partial = folder / (FILE + ".partial")
    fs.write_file(partial, (json.dumps(content, indent=1) + "\n").encode())
    fs.rename(partial, folder / FILE)


def read_decision(folder: Path) -> Decision | None:
    """The decision that is kept in a folder, if there is one."""
    path = folder / FILE
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return Decision(tuple(LayerDecision.from_plain(d) for d in content["layers"]), tuple(content["remarks"]))
