"""Plain text out of manual pages: enough of roff(7) and man(7) for prose, without calling groff."""

from __future__ import annotations

import re

# Macros whose arguments are text that the reader sees; every other request is layout and is dropped.
_TEXT_MACROS = frozenset(
    ("B", "I", "R", "SM", "SB", "BI", "BR", "IB", "IR", "RB", "RI", "SH", "SS", "TP", "IP", "TQ", "MR", "UR")
)
_SKIPPED_BLOCKS = {"de": "..", "ig": "..", "TS": ".TE", "EQ": ".EN", "PS": ".PE"}

_GLYPHS = {
    "aq": "'", "oq": "'", "cq": "'", "lq": '"', "rq": '"', "dq": '"', "em": "-", "en": "-", "hy": "-", "mi": "-",
    "bu": "*", "ha": "^", "ti": "~", "rs": "\\", "co": "(c)", "rg": "(R)", "->": "->", "<-": "<-", ">=": ">=",
    "<=": "<=", "mu": "x", "sc": "§", "Fo": "«", "Fc": "»", "Bq": "„", "fo": "<", "fc": ">", "ga": "`", "aa": "'",
    ":a": "ä", ":o": "ö", ":u": "ü", ":A": "Ä", ":O": "Ö", ":U": "Ü", "ss": "ß", "'e": "é", "`e": "è", "`a": "à",
    "Aq": "'", "C`": '"', "C'": '"', "L\"": '"', "R\"": '"', "T<": "<", "T>": ">",
}  # fmt: skip

_GLYPH = re.compile(r"\\[(*](?:\((..)|(..))|\\[*]?\[([^\]]*)\]|\\\*(.)")
_DROPPED = re.compile(
    r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[-+]?\d+|\\[hvwlDZ]'[^']*'|\\[&%|^/,:c)]|\\[mMkn](?:\[[^\]]*\]|\(..|.)"
)
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')
_CONDITIONAL = re.compile(r"(?:ie|el|if)\b")


def _inline(text: str) -> str:
    """Resolve the escapes of one line."""
    text = text.split('\\"', 1)[0]
    text = _GLYPH.sub(lambda m: _GLYPHS.get(next((g for g in m.groups() if g is not None), ""), ""), text)
    text = _DROPPED.sub("", text)
    return text.replace("\\-", "-").replace("\\ ", " ").replace("\\~", " ").replace("\\0", " ") \
        .replace("\\'", "'").replace("\\`", "`").replace("\\.", ".").replace("\\e", "\\")  # fmt: skip


def _request(line: str) -> tuple[str, str]:
    body = line[1:].lstrip()
    parts = body.split(None, 1)
    return (parts[0] if parts else ""), (parts[1] if len(parts) > 1 else "")


def _macro_text(name: str, rest: str) -> str:
    """The visible words of a text macro; alternating-font macros join their arguments without a space."""
    words = [(quoted.replace('""', '"') if quoted else plain) for quoted, plain in _ARGUMENT.findall(rest)]
    if name in ("IP", "UR"):
        words = words[:1]
    return ("" if name in ("BI", "BR", "IB", "IR", "RB", "RI") else " ").join(words)


def plain_text(source: str) -> str:
    """Text of a man(7) page: headings and paragraphs separated by blank lines, lines as they were filled.

    Pages in mdoc(7) (``.Dd``) come back empty: their macros would need a second table for little gain.
    """
    if re.search(r"^\.Dd\b", source, re.M):
        return ""
    out: list[str] = []
    until = ""
    for line in source.replace("\\\n", "").splitlines():
        if until:
            until = "" if line.startswith(until) else until
            continue
        if not line.startswith((".", "'")):
            out.append(_inline(line).rstrip())
            continue
        name, rest = _request(line)
        if name in _SKIPPED_BLOCKS:
            until = _SKIPPED_BLOCKS[name]
        elif name in _TEXT_MACROS:
            if name in ("SH", "SS", "TP", "IP"):
                out.append("")
            out.append(_inline(_macro_text(name, rest)).rstrip())
        elif name in ("PP", "P", "LP", "sp", "HP", "RS", "RE") and not _CONDITIONAL.match(name):
            out.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip() + "\n"
