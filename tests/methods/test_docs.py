"""The pages about methods say what the code does."""

from __future__ import annotations

import re

import pytest

from mergekit_lr.registry import builtin_methods

from .parameter_tables import DOCS, END, START, pages, renewed

METHODS = builtin_methods()
SECTIONS = ["## Formula", "## Parameters", "## Degenerate cases", "## Against the paper", "## Cost"]


@pytest.mark.parametrize("path", pages(), ids=lambda p: p.name)
def test_tables_are_those_of_the_code(path: object) -> None:
    table = pages()[path]  # type: ignore[index]
    text = path.read_text()  # type: ignore[attr-defined]
    assert text.count(START) == text.count(END) == 1
    assert renewed(text, table) == text, "run `python tests/methods/parameter_tables.py`"


@pytest.mark.parametrize("name", METHODS)
def test_pages_are_complete(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text()
    assert text.startswith(f"# {name}\n")
    places = [text.find(s) for s in SECTIONS]
    assert -1 not in places
    assert places == sorted(places)
    assert METHODS[name].source.link in text
    assert f"configs/{name}.yml" in text
    assert "random" in text.lower() or not METHODS[name].stochastic


def test_no_page_without_a_method() -> None:
    # Methods that other packages or later versions add bring their own page; a stale page is a mistake.
    assert {p.stem for p in DOCS.glob("*.md")} - {"README"} <= set(METHODS)


def test_links_lead_somewhere() -> None:
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert target.startswith("https://") or (path.parent / target).exists(), (path.name, target)
