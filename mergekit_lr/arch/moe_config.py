"""config.json of a mixture whose experts became fewer or narrower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lr.arch.moe import MoeLayer
from mergekit_lr.arch.moe_families import EXPERT_KEYS, SHARED_KEYS, TOP_K_KEYS, Family
from mergekit_lr.arch.stack import language_config
from mergekit_lr.errors import CheckpointError


@dataclass(frozen=True)
class ShrunkConfig:
    """The new config, and in words what changed beyond what was asked for."""

    config: dict[str, Any]
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Groups:
    """The router first chooses ``chosen`` of ``count`` groups of experts that stand next to each other."""

    count: int
    chosen: int

    def members(self, experts: int) -> list[range]:
        """The experts of each group."""
        size = experts // self.count
        return [range(g * size, (g + 1) * size) for g in range(self.count)]


def groups_of(config: Mapping[str, Any], family: Family) -> Groups | None:
    """The groups that the router chooses among first; None where it chooses among all experts at once."""
    section = language_config(config)
    if not family.grouped or section.get("topk_method") == "greedy":
        return None
    count, chosen = section.get("n_group"), section.get("topk_group")
    if type(count) is not int or count <= 1:
        return None
    return Groups(count, chosen if type(chosen) is int else count)


def top_k(config: Mapping[str, Any]) -> int | None:
    """How many experts a token is sent to."""
    section = language_config(config)
    return next((section[k] for k in TOP_K_KEYS if type(section.get(k)) is int), None)


def shrunk_config(
    config: Mapping[str, Any],
    layer: MoeLayer,
    *,
    experts: int | None = None,
    width: int | None = None,
    experts_per_token: int | None = None,
    reference: str = "config.json",
) -> ShrunkConfig:
    """``config`` for ``experts`` experts of ``width`` neurons; every alias of a key that is there is set.

    ``layer``: any of the model's layers as it is now. A top-k over what is left is lowered, which is noted.

    Raises:
        CheckpointError: groups of experts that the count does not fill evenly, or a width that the family cannot
            have.
    """
    section = dict(language_config(config))
    notices: list[str] = []
    count, wide = experts or layer.experts, width or layer.width
    _check_groups(section, layer.family, count, reference)
    for key in EXPERT_KEYS:
        if key in section:
            section[key] = count
    if wide != layer.width:
        notices += _narrow(section, layer, wide, reference)
    notices += _fewer_per_token(section, layer.family, count, experts_per_token)
    nested = isinstance(config.get("text_config"), dict)
    return ShrunkConfig({**config, "text_config": section} if nested else section, tuple(notices))


def _check_groups(section: Mapping[str, Any], family: Family, count: int, reference: str) -> None:
    groups = groups_of(section, family)
    if groups is None:
        return
    if count % groups.count or count // groups.count < family.group_least:
        fit = list(range(groups.count * family.group_least, count + groups.count + 1, groups.count))[-2:]
        raise CheckpointError(
            f"{count} experts do not fill {groups.count} groups",
            where=reference,
            why=f"its router chooses among n_group {groups.count} equal groups of at least {family.group_least} first",
            fix=f"use num_experts {' or '.join(map(str, fit)) or groups.count * family.group_least}",
        )


def _narrow(section: dict[str, Any], layer: MoeLayer, wide: int, reference: str) -> list[str]:
    family = layer.family
    if family.shares_width:
        raise CheckpointError(
            f"the experts of {family.name} cannot become narrower", where=reference, why=family.shares_width
        )
    for key in family.width_key:
        section[key] = wide
    shared = [k for k in SHARED_KEYS if type(section.get(k)) is int] if family.shared_multiple else []
    notices = []
    for key in shared:
        total = section[key] * layer.width
        if total % wide:
            fit = [w for w in range(wide, layer.width + 1) if total % w == 0]
            raise CheckpointError(
                f"experts of width {wide} cannot be written",
                where=reference,
                why=f"the shared experts are {total} wide, which must be a multiple of it",
                fix=f"use width {fit[0]}" if fit else "",
            )
        if section[key] != total // wide:
            notices.append(f"{key} is now {total // wide}: the same shared experts, counted in the new width")
            section[key] = total // wide
    return notices


def _fewer_per_token(section: dict[str, Any], family: Family, count: int, wanted: int | None) -> list[str]:
    groups = groups_of(section, family)
    most = count if groups is None else groups.chosen * (count // groups.count)
    notices = []
    for key in TOP_K_KEYS:
        old = section.get(key)
        if type(old) is not int:
            continue
        new = min(wanted or old, most)
        if new != old:
            section[key] = new
            notices.append(f"{key} is now {new}, it was {old}: a token passes fewer experts than before")
    return notices
