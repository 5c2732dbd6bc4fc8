"""The part of a recipe that says what a model is run on: ``calibration``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_lr.recipe.problems import Problems, nearest
from mergekit_lr.recipe.yaml import Entry, Mapping, Node, Scalar, Sequence, said

CALIBRATION_KEYS = ("text", "dataset", "samples", "sequence_length", "statistics")
MAX_SAMPLES = 1_000_000
MAX_LENGTH = 1_000_000


@dataclass(frozen=True)
class Calibration:
    """Text that a model is run on, or statistics from an earlier run.

    ``text``: UTF-8 files; ``dataset``: an id on the Hub; ``samples`` windows of ``sequence_length`` tokens are drawn
    from them under the recipe's seed. ``statistics``: a file that ``calibrate`` wrote, used instead of running the
    model where it holds all that the method needs. Paths are relative to the working directory, like models.
    """

    text: tuple[str, ...] = ()
    dataset: str | None = None
    samples: int = 128
    sequence_length: int = 512
    statistics: str | None = None

    def plain(self) -> dict[str, Any]:
        """As a recipe writes it."""
        found = {"text": list(self.text), "dataset": self.dataset, "statistics": self.statistics}
        sizes = {"samples": self.samples, "sequence_length": self.sequence_length}
        return {k: v for k, v in found.items() if v} | sizes


def read_calibration(entry: Entry, problems: Problems) -> Calibration | None:
    """The section, or None where something is wrong with it, which is noted."""
    node = entry.value
    if not isinstance(node, Mapping):
        problems.add(node.mark, "calibration", "must be a mapping", "write `calibration: {text: [FILE]}`")
        return None
    before = problems.count
    for key, item in node.entries.items():
        if key not in CALIBRATION_KEYS:
            problems.add(item.key_mark, f"calibration.{key[:60]}", "unknown key", nearest(key, CALIBRATION_KEYS))
    entries = {k: e.value for k, e in node.entries.items() if k in CALIBRATION_KEYS}
    found = Calibration(
        text=_files(entries.get("text"), problems),
        dataset=_word(entries, "dataset", problems),
        samples=_whole(entries, "samples", Calibration.samples, MAX_SAMPLES, problems),
        sequence_length=_whole(entries, "sequence_length", Calibration.sequence_length, MAX_LENGTH, problems),
        statistics=_word(entries, "statistics", problems),
    )
    if problems.count == before and not (found.text or found.dataset or found.statistics):
        problems.add(node.mark, "calibration", "says nothing to run on", "add `text: [FILE]`, or `statistics: FILE`")
    return found if problems.count == before else None


def _files(node: Node | None, problems: Problems) -> tuple[str, ...]:
    if node is None or (isinstance(node, Scalar) and node.value is None):
        return ()
    items = node.items if isinstance(node, Sequence) else [node]
    for item in items:
        if not isinstance(item, Scalar) or not isinstance(item.value, str) or not item.value:
            problems.add(item.mark, "calibration.text", "must be file names", "write `text: [a.txt, b.txt]`")
            return ()
    return tuple(str(i.value) for i in items if isinstance(i, Scalar))


def _word(entries: dict[str, Node], key: str, problems: Problems) -> str | None:
    node = entries.get(key)
    if node is None or (isinstance(node, Scalar) and node.value is None):
        return None
    if isinstance(node, Scalar) and isinstance(node.value, str) and node.value:
        return node.value
    problems.add(node.mark, f"calibration.{key}", "must be one line of text", f"write `{key}: NAME`")
    return None


def _whole(entries: dict[str, Node], key: str, default: int, most: int, problems: Problems) -> int:
    node = entries.get(key)
    if node is None or (isinstance(node, Scalar) and node.value is None):
        return default
    if isinstance(node, Scalar) and type(node.value) is int and 1 <= node.value <= most:
        return node.value
    fix = f"write a whole number from 1 to {most:,}"
    problems.add(node.mark, f"calibration.{key}", f"{said(node)} is no count", fix)
    return default
