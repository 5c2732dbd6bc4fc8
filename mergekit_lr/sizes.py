"""Sizes in bytes as people write them: ``8GiB`` is binary, ``5GB`` and mergekit's ``5B`` are decimal."""

from __future__ import annotations

import re
from fractions import Fraction

from mergekit_lr.errors import UsageError

UNITS = {
    "": 1,
    **{prefix + "B": 1000**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)},
    **{prefix: 1000**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)},
    **{prefix + "IB": 1024**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)},
    "B": 1000**3,
}
"""Bytes in a unit, in capitals. A lone ``B`` is a billion, as in mergekit's ``--out-shard-size 5B``."""

MAX_SIZE = 2**63 - 1

_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([A-Za-z]{0,3})", re.ASCII)


def parse_size(text: str | int) -> int:
    """Whole bytes in ``text``: ``8GiB``, ``256 MiB``, ``5GB``, ``5G``, ``5B``, ``1.5GiB``, ``1000000``.

    Upper or lower case. A fraction of a byte is dropped.

    Raises:
        UsageError: it is not a size, not positive, or beyond 2^63 - 1 bytes.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    else:
        match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
        unit = UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise UsageError(f"{text!r} is not a size", fix="write for example 8GiB, 256MiB or 5GB")
        size = int(Fraction(match[1]) * unit)
    if not 0 < size <= MAX_SIZE:
        raise UsageError(f"the size {text!r} is out of range", fix="write for example 8GiB, 256MiB or 5GB")
    return size


def parse_bandwidth(text: str | int | float) -> int:
    """Whole bytes a second in ``text``: a size, with ``/s`` behind it or without: ``2GB/s``, ``500MiB``.

    Raises:
        UsageError: as `parse_size`.
    """
    if isinstance(text, str):
        return parse_size(re.sub(r"\s*/\s*s(ec)?$", "", text.strip()))
    return parse_size(int(text))


def format_duration(seconds: float) -> str:
    """``seconds`` in words: ``42 s``, ``12 min``, ``3.4 h``."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


def format_size(size: int) -> str:
    """``size`` bytes in words: ``1.3 GB``; decimal units, three digits at most."""
    if size < 1000:
        return f"{size} B"
    power = min(4, max(1, (len(str(size)) - 1) // 3))
    value = size / 1000**power
    if value >= 999.5 and power < 4:
        value, power = value / 1000, power + 1
    unit = ("kB", "MB", "GB", "TB")[power - 1]
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.1f} {unit}"
