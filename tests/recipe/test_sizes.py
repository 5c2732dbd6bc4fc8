"""Sizes: units, and what is no size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lr.errors import UsageError
from mergekit_lr.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8_589_934_592),
        ("256MiB", 268_435_456),
        ("256 mib", 268_435_456),
        ("1KiB", 1024),
        ("2TiB", 2_199_023_255_552),
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("5G", 5_000_000_000),
        ("5B", 5_000_000_000),
        ("500M", 500_000_000),
        ("500MB", 500_000_000),
        ("10K", 10_000),
        ("1.5GiB", 1_610_612_736),
        ("0.1GB", 100_000_000),
        (" 7 ", 7),
        ("1000000", 1_000_000),
        (1_000_000, 1_000_000),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0GB", "-1GB", "1XB", "1 G B", "1e9", "nan", ".5GB", "1,5GB", "9" * 30, "10000000T", 0, -1]
)
def test_what_is_no_size(text: str | int) -> None:
    with pytest.raises(UsageError, match="8GiB"):
        parse_size(text)


@pytest.mark.parametrize("value", [True, 1.5, None, [1]])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(UsageError):
        parse_size(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (1_340_000_000, "1.3 GB"),
        (999_900_000_000, "1.0 TB"),
        (2_000_000_000_000_000, "2000 TB"),
    ],
)
def test_formatting(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 10**15))
def test_what_is_printed_is_within_six_percent(size: int) -> None:
    """Two digits at least: half a unit of the second digit of 1.0 is 5 %."""
    assert parse_size(format_size(size).replace(" B", "")) == pytest.approx(size, rel=0.06)
