"""What `mergekit_lr.report.verify` found, what it looked at, and what it could not look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Verification:
    """``problems`` make the folder unfit or say that it is not what was written; ``warnings`` are worth a look.

    ``kind``: ``model``, ``adapter``, ``bundle`` or ``file``. ``checked`` and ``unchecked``: what was compared, and
    what could not be, each with the reason.
    """

    path: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    scanned: bool = False
    digests_checked: int = 0
    kind: str = "model"
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def looked(self, what: str, missing: str = "") -> None:
        """Note that ``what`` was checked or, with the reason ``missing``, that it could not be."""
        if missing:
            self.unchecked.append(f"{what} ({missing})")
        else:
            self.checked.append(what)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"ok": not self.problems, **vars(self)}

    def summary_lines(self) -> list[str]:
        """For people: the verdict, then one problem or warning a line, then what it rests on."""
        done = f"{self.tensors:,} tensors in {self.files} files"
        done += ", every value finite" if self.scanned and not self.problems else ""
        done += f", {self.digests_checked:,} digests match" if self.digests_checked and not self.problems else ""
        verdict = f"{len(self.problems)} problems" if self.problems else "sound"
        return [
            f"{self.path}: {verdict} ({done})",
            *(f"problem: {p}" for p in self.problems),
            *(f"warning: {w}" for w in self.warnings),
            *([f"checked: {'; '.join(self.checked)}"] if self.checked else []),
            *([f"not checked: {'; '.join(self.unchecked)}"] if self.unchecked else []),
        ]
