"""Names that are code where they are shown: in the card, in the report, in a terminal (row 33)."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from staging import attack, main, merged, model

import mergekit_lr
from mergekit_lr.cli.app import printable

PIECES = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg onload=alert(1)>", "<iframe src=javascript:1>",
    "<a href=javascript:x>y</a>", "</code></pre><script>", "<!--", "-->", "<style>*{display:none}</style>",
    "[x](javascript:alert(1))", "![x](https://evil.example/p.png)", "<https://evil.example>", "https://evil.example",
    "www.evil.example", "[a]: https://evil.example", "```", "````", "~~~", "`a`", "**b**", "# h", "- i", "| a | b |",
    "> q", "---", "...", "a: b", "? a", "!!python/object:os.system", "&a *a", "{a: b}", "[a, b]", "'q\"", "\\", "$$x$$",
    "@user #1", "&lt;b&gt;", "%%{init}%%", "日本 \u202e", "a\u2028b", "\u0085", "\ufeff",
    "x" * 90, "{{7*7}}", "${7*7}", "<%= 7 %>", "=cmd()", "+1", "-1", "\u200b\u200d",
]  # fmt: skip
ALLOWED = {"h1", "h2", "h3", "p", "a", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "em"}


def names() -> list[str]:
    """Over 200 names: each piece alone, behind, before and between letters, and twice."""
    ways = [(p, f"a{p}", f"{p}b", f"a {p} b", f"{p} {p}") for p in PIECES]
    every = dict.fromkeys(n for way in ways for n in way)
    return [n for n in every if "/" not in n and len(n.encode()) < 250]


class Page(html.parser.HTMLParser):
    """Tags, links and handlers of a rendered card."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("href", "src")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def check_card(text: str, shown: list[str]) -> None:
    front = re.search(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\r|\n|$))", text)
    assert front, "no front matter"
    assert yaml.safe_load(front[2])["base_model"] == list(dict.fromkeys(shown)), front[2]
    page = Page()
    page.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(text[front.end() :]))
    assert page.tags <= ALLOWED and not page.handlers, page.tags - ALLOWED
    assert all(link.startswith(("https://arxiv.org/", "https://huggingface.co/")) for link in page.links), page.links


@attack(33)
def folders(room: Path) -> str:
    """folders called like scripts, links, fences and YAML: a real merge of each, its card rendered"""
    from mergekit_lr.checkpoint.reference import Place
    from mergekit_lr.report.card import display_name

    (room / "b").mkdir()
    other = model(room / "b" / "other")
    done = 0
    for number, name in enumerate(names()):
        if not name.strip() or name != name.strip() or "@" in name or "+" in name or not name.isprintable():
            continue
        folder = model(room / "a" / name)
        out = room / f"out{number}"
        report = merged(folder, other, out=out)
        card = (out / "README.md").read_text(encoding="utf-8")
        check_card(card, [display_name(Place(str(folder))), "other"])
        assert json.loads((out / "merge_report.json").read_text())["inputs"][0]["model"] == str(folder)
        assert yaml.safe_load((out / "mergekit_lr.yml").read_text())["models"][0]["model"] == str(folder)
        assert report["inputs"][0]["model"] == str(folder)
        done += 1
        if done == 40:  # the others go through the card alone, below
            break
    return f"{done} merges: no script, no foreign link, no handler; metadata parse back equal"


@attack(33)
def cards(room: Path) -> str:
    """200 names put into a card behind the back of the recipe's own checks"""
    from mergekit_lr.checkpoint.model import Checkpoint
    from mergekit_lr.checkpoint.reference import ModelReference, Place
    from mergekit_lr.recipe import load_recipe
    from mergekit_lr.report.card import display_name, model_card

    hostile = [n for n in names() if n.strip()]
    assert len(hostile) >= 180, len(hostile)
    for name in hostile:
        made = load_recipe(
            {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in ("o/a", "o/b")]}
        )
        reference = ModelReference(Place(name))
        models = (made.models[0].__class__(reference, made.models[0].parameters), made.models[1])
        object.__setattr__(made, "models", models)
        object.__setattr__(made, "text", f"models:\n  - model: {name}\n```\n<script>\n")
        opened = [Checkpoint(str(r), None, None, {}, {}, ()) for r in made.references()]
        check_card(model_card(made, opened), [display_name(reference.model), "o/b"])
    return f"{len(hostile)} names: no script, no foreign link, no handler; metadata parse back equal"


@attack(33)
def terminal(room: Path) -> str:
    """files whose names move the cursor, ring, or write a second line: listed by verify and in errors"""
    folder = model(room / "a")
    for name in ("\x1b[2J\x1b[Hsound\r.safetensors", "x\nproblem: none.safetensors", "\x07\x9b31m.bin", "a\u202eb.py"):
        (folder / name).write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-c", "from mergekit_lr.cli import main; main()", "verify", str(folder)],
        capture_output=True, check=False,
    )  # fmt: skip
    text = (done.stdout + done.stderr).decode()
    assert done.returncode == 6, text
    assert all(line.isprintable() for line in text.split("\n")), text
    assert not any(line.startswith("problem: none") for line in text.split("\n"))
    assert printable("\x1b[2J\nx") == "\\x1b[2J\\nx"
    found = mergekit_lr.verify(folder)
    assert json.loads(json.dumps(found.to_dict()))["problems"] == found.problems
    return "shown as \\x1b and \\n"


main(__name__)
