"""What a run tells of itself while it works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class ProgressEvent:
    """Bytes dealt with so far, read and written together; ``stage`` in a word or two."""

    done_bytes: int
    total_bytes: int
    stage: str


Progress: TypeAlias = Callable[[ProgressEvent], None]
