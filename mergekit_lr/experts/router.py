"""The router's rows after experts became fewer, as a matrix on the old rows: ``new = M old``.

``mean``: the weighted mean of the members' rows. ``select``: the centre's row, unchanged. ``tied``: all rows stay, and
the gates of a group's members add up; no stock loader can do that, so it needs the sidecar.
"""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lr.experts.merging import shares
from mergekit_lr.experts.partition import Partition

ROUTERS = ("mean", "select", "tied")

Row = tuple[tuple[int, float], ...]
"""One new row: (old row, its share)."""


def router_rows(kind: str, partition: Partition, weights: Sequence[float], experts: int) -> tuple[Row, ...]:
    """The rows of a router of one layer; ``weights`` are the experts' frequencies.

    A row that is one old row with share 1 is copied to the bit.
    """
    if kind == "tied":
        return tuple(((e, 1.0),) for e in range(experts))
    rows: list[Row] = []
    for group in partition.groups:
        if kind == "select" or group.alone:
            rows.append(((group.centre, 1.0),))
        else:
            own = shares([weights[e] for e in group.members])
            rows.append(tuple((e, s) for e, s in zip(group.members, own, strict=True) if s > 0))
    return tuple(rows)
