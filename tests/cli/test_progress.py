"""Progress: plain lines, the terminal's bar, and silence."""

from __future__ import annotations

import io

import pytest

from mergekit_lr.engine.progress import ProgressEvent
from mergekit_lr.progress import Lines, format_seconds, show_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_every_few_seconds_with_rate_and_time_left() -> None:
    """1 GB of 4 GB after 10 s is 100 MB/s and leaves 30 s."""
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    for second in range(11):
        clock.now = 100.0 + second
        lines(ProgressEvent(second * 100_000_000, 4_000_000_000, "merging"))
    assert stream.getvalue().splitlines() == [
        "merging: 0% of 4.0 GB",
        "merging: 12% of 4.0 GB, 100 MB/s, 35 s left",
        "merging: 25% of 4.0 GB, 100 MB/s, 30 s left",
    ]


def test_what_an_earlier_run_did_does_not_count_as_speed() -> None:
    """Resumed at 2 GB; 1 GB more in 10 s is 100 MB/s, and the last 1 GB takes 10 s."""
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    lines(ProgressEvent(2_000_000_000, 4_000_000_000, "merging"))
    clock.now += 10
    lines(ProgressEvent(3_000_000_000, 4_000_000_000, "merging"))
    assert stream.getvalue().splitlines()[-1] == "merging: 75% of 4.0 GB, 100 MB/s, 10 s left"


def test_a_new_stage_is_told_at_once_and_an_empty_run_is_done() -> None:
    stream, clock = io.StringIO(), Clock()
    lines = Lines(stream, clock)
    lines(ProgressEvent(0, 0, "statistics"))
    lines(ProgressEvent(0, 0, "merging"))
    assert stream.getvalue().splitlines() == ["statistics: 100% of 0 B", "merging: 100% of 0 B"]


def test_quiet_gives_no_callback() -> None:
    with show_progress(quiet=True, stream=io.StringIO()) as progress:
        assert progress is None


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    stream = Terminal()
    with show_progress(quiet=False, stream=stream) as progress:
        assert progress is not None
        assert not isinstance(progress, Lines)
        progress(ProgressEvent(500, 1000, "merging"))
    assert "merging" in stream.getvalue()


def test_no_terminal_gets_lines() -> None:
    with show_progress(quiet=False, stream=io.StringIO()) as progress:
        assert isinstance(progress, Lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7790, "2 h 09 min"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
