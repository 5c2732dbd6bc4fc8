"""The card: what it says, and that no name in it can do anything."""

from __future__ import annotations

import html
import html.parser
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mergekit_lr.checkpoint.model import Checkpoint
from mergekit_lr.checkpoint.reference import ModelReference, Place
from mergekit_lr.recipe import load_recipe
from mergekit_lr.recipe.schema import Recipe
from mergekit_lr.report.card import display_name, escape, license_of, model_card

SHA = "0123456789abcdef0123456789abcdef01234567"


def opened(recipe: Recipe, folders: Sequence[Path | None] = (), **changes: Any) -> list[Checkpoint]:
    """Checkpoints as a merge would have opened them, without files."""
    references = recipe.references()
    places = [*folders, *[None] * len(references)]
    out = [Checkpoint(str(r), f, {"model_type": "llama"}, {}, {}, ()) for r, f in zip(references, places, strict=False)]
    for checkpoint in out:
        for key, value in changes.items():
            setattr(checkpoint, key, value)
    return out


def recipe(*models: str, base: str | None = None, method: str = "linear") -> Recipe:
    entries = [{"model": m, "parameters": {"weight": 1.0}} for m in models]
    source: dict[str, Any] = {"merge_method": method, "models": entries}
    return load_recipe({**source, "base_model": base} if base else source)


def metadata(card: str) -> dict[str, Any]:
    """Front matter as the Hub's own expression finds it."""
    found = re.search(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\r|\n|$))", card)
    assert found
    parsed: dict[str, Any] = yaml.safe_load(found[2])
    return parsed


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


class Tags(html.parser.HTMLParser):
    """Every tag and link of rendered HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("href", "src")]
        assert not any(k.startswith("on") for k, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(card: str) -> Tags:
    tags = Tags()
    tags.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(body(card)))
    return tags


def test_what_it_says() -> None:
    made = recipe("org/a", "org/b", base="org/base", method="task_arithmetic")
    card = model_card(made, opened(made, revision=SHA))
    assert metadata(card) == {
        "base_model": ["org/base", "org/a", "org/b"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["mergekit_lr", "merge", "task_arithmetic"],
    }
    page = rendered(card)
    assert f"https://huggingface.co/org/a/tree/{SHA}" in page.links
    assert any(link.startswith("https://arxiv.org/abs/") for link in page.links)
    assert SHA in page.text and "org/base" in page.text and "task_arithmetic" in page.text
    assert made.text.strip() in page.text
    assert page.tags <= {"h1", "h2", "p", "a", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}


def test_repeats_appear_once_and_adapters_are_named() -> None:
    made = recipe("org/a+org/lora", "org/a", "org/a")
    card = model_card(made, opened(made))
    assert metadata(card)["base_model"] == ["org/a", "org/lora"]
    assert card.count("| [org/a]") == 2  # with and without the adapter


def test_local_paths_are_shown_by_name_only(tmp_path: Path) -> None:
    for name in ("ft_a", "ft_b"):
        (tmp_path / "private" / name).mkdir(parents=True)
    paths = [str(tmp_path / "private" / n) for n in ("ft_a", "ft_b")]
    made = recipe(*paths)
    card = model_card(made, opened(made, [Path(p) for p in paths]))
    assert "private" not in card and str(tmp_path) not in card
    assert metadata(card)["base_model"] == ["ft_a", "ft_b"] and "huggingface.co" not in card


def test_raw_state_dicts_name_no_library() -> None:
    made = recipe("a.safetensors", "b.safetensors")
    assert "library_name" not in metadata(model_card(made, opened(made, config=None)))


@pytest.mark.parametrize(
    ("fronts", "expected"),
    [
        (["license: mit", "license: mit"], "mit"),
        (["license: 'apache-2.0'", 'license: "apache-2.0"'], "apache-2.0"),
        (["license: mit", "license: apache-2.0"], None),
        (["license: mit", "tags: [x]"], None),
        (["license: mit", None], None),
        (["license: other", "license: other"], None),
        (["license: mit\nlicense: gpl", "license: mit"], None),
        (["license: *alias", "license: *alias"], None),
        (["x: |\n  license: mit", "x: 1"], None),
    ],
)
def test_licence_only_where_all_agree(fronts: list[str | None], expected: str | None, tmp_path: Path) -> None:
    folders = []
    for i, front in enumerate(fronts):
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        if front is not None:
            (folders[-1] / "README.md").write_text(f"---\n{front}\n---\n\nlicense: gpl\n")
    made = recipe(*map(str, folders))
    assert metadata(model_card(made, opened(made, folders))).get("license") == expected


def test_a_readme_without_front_matter_states_no_licence(tmp_path: Path) -> None:
    for text in ("license: mit\n", "# x\n---\nlicense: mit\n---\n", "---\nlicense: mit\n", ""):
        (tmp_path / "README.md").write_text(text)
        assert license_of(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n\xff\xfe")
    assert license_of(tmp_path) == "mit"


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</code></pre><script>x</script>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/pixel.png)",
    "<https://evil.example>",
    "https://evil.example",
    "www.evil.example",
    "a | b | c",
    "```\n# owned\n```",
    "````````",
    "`code`",
    "**bold** _it_ ~~no~~",
    "# title",
    "---",
    "...",
    "a: b",
    "- item",
    "!!python/object/apply:os.system [x]",
    "&anchor *alias",
    "{a: b}",
    "'single' \"double\"",
    "\\\\ \\n \\",
    "$$x$$",
    "@someone #1",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "日本語 \u202e gnp.exe",
    "a\u2028b\u0085c",
    "[ref]: https://evil.example",
    "<!-- comment -->",
    "%%{init}%%",
]


def hostile_card(name: str) -> tuple[str, str]:
    """A card of a recipe whose models have this name, put in behind the reference parser's back."""
    made = recipe("org/a", "org/b")
    reference = ModelReference(Place(name))
    clean = made.models[0].reference
    object.__setattr__(made, "models", (made.models[0].__class__(reference, made.models[0].parameters), made.models[1]))
    object.__setattr__(made, "text", f"models:\n  - model: {name}\n")
    assert clean != reference
    return model_card(made, opened(made)), display_name(reference.model)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_do_nothing(name: str) -> None:
    card, shown = hostile_card(name)
    assert metadata(card)["base_model"] == list(dict.fromkeys([shown, "org/b"]))
    page = rendered(card)
    assert page.tags <= {"h1", "h2", "p", "a", "code", "pre", "table", "thead", "tbody", "tr", "th", "td"}
    assert all(link.startswith(("https://arxiv.org/abs/", "https://huggingface.co/")) for link in page.links)
    # The name is there to be read, twice: in the title and in the table.
    flat = " ".join(page.text.split())
    assert flat.count(" ".join(html.unescape(html.escape(shown)).split())) >= 2


@settings(max_examples=300, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_escaped_text_renders_as_itself(text: str) -> None:
    page = Tags()
    page.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render("x " + escape(text) + " x"))
    printable = "".join(c if c.isprintable() else " " for c in text)
    assert page.tags <= {"p"}
    assert " ".join(page.text.split()) == " ".join(f"x {printable} x".split())


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=40).filter(lambda t: t.strip("/ \0") and "\0" not in t))
def test_metadata_parses_back(name: str) -> None:
    card, shown = hostile_card(name)
    assert metadata(card)["base_model"] == list(dict.fromkeys([shown, "org/b"]))
