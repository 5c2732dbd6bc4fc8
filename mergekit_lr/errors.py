"""One error family. Every error says what happened, where, why, and what to do about it.

The exit codes are part of the command line's contract: 0 ok, 1 a bug in this package, 2 usage, 3 recipe,
4 input model, 5 resources (the run can be resumed), 6 verification failed, 130 interrupted (resumable).
"""

from __future__ import annotations


class MergekitLrError(Exception):
    """Base of the family. ``str(error)`` is one line: ``where: what (why); fix``."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        line = f"{where}: {what}" if where else what
        if why:
            line += f" ({why})"
        if fix:
            line += f"; {fix}"
        super().__init__(printable(line))


def printable(text: str) -> str:
    """One line that a terminal shows and does not obey: names in it come from strangers' files."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UsageError(MergekitLrError):
    """The command or function was called with arguments that make no sense together."""

    exit_code = 2


class RecipeError(MergekitLrError):
    """The recipe is not valid. Carries every problem found, each with its line and column."""

    exit_code = 3

    def __init__(
        self, what: str, *, where: str = "", why: str = "", fix: str = "", problems: tuple[str, ...] = ()
    ) -> None:
        super().__init__(what, where=where, why=why, fix=fix)
        self.problems = tuple(map(printable, problems)) or (str(self),)


class CheckpointError(MergekitLrError):
    """An input model is missing, damaged, hostile, or does not fit the others."""

    exit_code = 4

    def __init__(
        self, what: str, *, where: str = "", why: str = "", fix: str = "", problems: tuple[str, ...] = ()
    ) -> None:
        super().__init__(what, where=where, why=why, fix=fix)
        self.problems = tuple(map(printable, problems)) or (str(self),)


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity, or would after the cast to the output dtype."""


class LinalgError(CheckpointError):
    """A decomposition was asked for something undefined, or could not meet its promise."""


class ResourceError(MergekitLrError):
    """Memory, disk or permissions. What was done so far is kept; the same command resumes."""

    exit_code = 5


class VerificationError(MergekitLrError):
    """An output folder does not hold what it claims."""

    exit_code = 6


def join_problems(kind: type[RecipeError] | type[CheckpointError], problems: list[str]) -> MergekitLrError:
    """One error that carries all ``problems``, so that a user can mend them in one go."""
    first = problems[0]
    rest = f" [and {len(problems) - 1} more]" if len(problems) > 1 else ""
    return kind(first + rest, problems=tuple(problems))
