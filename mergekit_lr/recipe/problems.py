"""Collects everything that is wrong with a recipe, so that one run reports it all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from mergekit_lr.errors import RecipeError

EXCERPT = 60
MOST = 100
"""Problems after which reading stops: nobody reads more, and a hostile file must not cost minutes."""


class Mark(NamedTuple):
    """A place in the recipe's text. Both count from 1."""

    line: int
    column: int


def shown(value: object) -> str:
    """A value as an error message quotes it: on one line and short."""
    try:
        text = repr(value)
    except ValueError:  # an int beyond the interpreter's digit limit has no repr
        text = "a number of thousands of digits"
    return text if len(text) <= EXCERPT else text[: EXCERPT - 3] + "..."


def printable(text: str) -> str:
    """``text`` with line breaks and control characters escaped: keys of a recipe may hold any."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """``did you mean ...?`` for a misspelt word, or the known words where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word[:EXCERPT].lower(), names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known here: {', '.join(names)}" if names else "remove it"


@dataclass
class Problems:
    """The errors and warnings of one recipe. ``origin`` is the file's name, as messages give it."""

    origin: str
    _errors: list[tuple[Mark, str]] = field(default_factory=list)
    _warnings: list[tuple[Mark, str]] = field(default_factory=list)

    def where(self, mark: Mark | None) -> str:
        """``file:line:col``, or the origin alone for a recipe that is not text."""
        return f"{self.origin}:{mark.line}:{mark.column}" if mark else self.origin

    def _line(self, mark: Mark | None, path: str, what: str, fix: str) -> str:
        parts = [self.where(mark), path, what] if path else [self.where(mark), what]
        return printable(": ".join(parts) + (f"; {fix}" if fix else ""))

    def add(self, mark: Mark | None, path: str, what: str, fix: str = "") -> None:
        """Note an error: ``file:line:col: path: what; fix``. The hundredth raises RecipeError at once."""
        self._errors.append((mark or Mark(0, 0), self._line(mark, path, what, fix)))
        if len(self._errors) >= MOST:
            self.raise_if_any()

    def warn(self, mark: Mark | None, path: str, what: str, fix: str = "") -> None:
        """Note something legal that probably is not meant."""
        self._warnings.append((mark or Mark(0, 0), self._line(mark, path, what, fix)))

    @property
    def found(self) -> bool:
        return bool(self._errors)

    @property
    def count(self) -> int:
        """Errors so far."""
        return len(self._errors)

    def warnings(self) -> tuple[str, ...]:
        """Warnings in the order of the text."""
        return tuple(line for _, line in sorted(self._warnings, key=lambda e: e[0]))

    def error(self) -> RecipeError:
        """One RecipeError that carries every error, in the order of the text."""
        lines = tuple(dict.fromkeys(line for _, line in sorted(self._errors, key=lambda e: e[0])))
        rest = f" [and {len(lines) - 1} more]" if len(lines) > 1 else ""
        return RecipeError(lines[0] + rest, problems=lines)

    def raise_if_any(self) -> None:
        """Raise `error` if there is one."""
        if self._errors:
            raise self.error()

    def fail(self, mark: Mark | None, path: str, what: str, fix: str = "") -> NoReturn:
        """Note an error after which reading on makes no sense, and raise."""
        self.add(mark, path, what, fix)
        raise self.error()
