"""Which ways of doing a merge go together."""

from __future__ import annotations

from mergekit_lr.errors import UsageError


def refuse_together(
    *, part: str | None, workers: int | None, ray: str | None, threads: int | None, streams: bool
) -> None:
    """Options of which one says who does the work, or where it lies. ``streams``: a disk budget, or a push.

    Raises:
        UsageError: two of them were given.
    """
    on_ray = ray is not None or workers is not None
    if part is not None and on_ray:
        raise UsageError("a part is not done on Ray", fix="give --part, or --ray and --workers, not both")
    if threads is not None and on_ray:
        raise UsageError("a task of Ray has one thread", fix="leave --threads out; more tasks run at a time instead")
    if workers is not None and workers < 1:
        raise UsageError(f"workers is {workers}", fix="give 1 or more")
    if streams and (part is not None or on_ray):
        who, option = ("a part", "--part") if part is not None else ("a run on Ray", "--ray and --workers")
        raise UsageError(
            f"{who} has no disk budget and cannot push",
            why="all who work on it share one folder of inputs and one of outputs",
            fix=f"leave out {option}, or --disk-budget and --push",
        )
