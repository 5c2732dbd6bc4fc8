"""Renders what the pages in ``docs/methods`` say of each method from the code.

``python tests/methods/parameter_tables.py`` rewrites the marked parts of the pages; a test compares them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mergekit_lr.method import Base, Method
from mergekit_lr.recipe.catalogue import describe
from mergekit_lr.registry import builtin_methods

DOCS = Path(__file__).parents[2] / "docs" / "methods"
START, END = "<!-- from the code -->", "<!-- end -->"
BASE = {
    Base.REQUIRED: "required",
    Base.OPTIONAL: "optional",
    Base.OPERAND: "first input",
    Base.FRAME: "frame",
    Base.UNUSED: "not used",
}


def _shown(value: Any) -> str:
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def parameters(method: Method) -> str:
    """The table of a method's parameters, with who gets them, what they allow and what they mean."""
    found = describe(method)
    rows = []
    for scope, listed in (("merge", found["parameters"]), ("model", found["model_parameters"])):
        for p in listed:
            kind = p["type"] + (f", {p['range']}" if p["range"] else "")
            default = "required" if p["required"] else _shown(p["default"])
            meaning = p["description"].replace("|", "\\|")
            rows.append(f"| `{p['name']}` | {scope} | {kind} | {default} | {meaning} |")
    head = ["| parameter | of each | values | default | meaning |", "|---|---|---|---|---|"]
    return "\n".join(head + rows)


def index() -> str:
    """The table of all methods."""
    rows = [
        f"| [`{m.name}`]({m.name}.md) | {m.summary} | {BASE[m.base]} | {_models(m)} | "
        f"{'yes' if m.stochastic else ''} | [{m.source.title}]({m.source.link}) |"
        for m in builtin_methods().values()
    ]
    head = ["| method | what it does | base | models | random | source |", "|---|---|---|---|---|---|"]
    return "\n".join(head + rows)


def _models(method: Method) -> str:
    if method.max_models == method.min_models:
        return str(method.min_models)
    return f"{method.min_models} or more"


def renewed(text: str, table: str) -> str:
    """``text`` with its marked part replaced."""
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n{table}\n{END}", text)


def pages() -> dict[Path, str]:
    """Each page's path and its rendered table."""
    found = {DOCS / f"{name}.md": parameters(m) for name, m in builtin_methods().items()}
    return found | {DOCS / "README.md": index()}


if __name__ == "__main__":
    for path, table in pages().items():
        path.write_text(renewed(path.read_text(), table))
