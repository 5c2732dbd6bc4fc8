"""Where the zoo's text comes from: what an ordinary Debian machine with Python has on its disk.

Four domains, each a list of places that may or may not exist. A document carries a licence only when that
licence allows a slice of it to be committed beside Apache-2.0 code; documents without one are for training.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import re
import struct
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mergekit_lr.errors import ResourceError
from zoo.roff import plain_text

DOMAINS = ("english", "python", "c", "german")

# Below this a domain cannot carry a model of this size; above the cap more text changes nothing here.
_MINIMUM_BYTES = 600_000
_MAXIMUM_BYTES = {"english": 8_000_000, "python": 6_000_000, "c": 6_000_000, "german": 6_000_000}
_MAN = Path("/usr/share/man")
_LOCALE = Path("/usr/share/locale")

_INSTALL = {
    "english": "apt-get install manpages manpages-dev man-db (minimal images drop manual pages: see "
    "path-exclude in /etc/dpkg/dpkg.cfg.d)",
    "python": "install Python with its standard library as .py files",
    "c": "apt-get install libc6-dev linux-libc-dev python3-dev",
    "german": "apt-get install manpages-de git gettext libc-l10n postgresql-client (minimal images drop "
    "translations: see path-exclude in /etc/dpkg/dpkg.cfg.d)",
}


@dataclass(frozen=True)
class Document:
    """One piece of text. ``licence`` is empty when the text may be trained on but is not for committing."""

    name: str
    text: str
    licence: str = ""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


def _read(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _files(root: Path, pattern: str) -> Iterator[Path]:
    """Regular files under ``root`` in name order; links are left out, they repeat what they point at."""
    if root.is_dir():
        yield from sorted(p for p in root.rglob(pattern) if p.is_file() and not p.is_symlink())


_NOT_LIBRARY = r"(^|/)(test|tests|idle_test|site-packages|dist-packages|encodings|pydoc_data|config-[^/]*)/"


def _python() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in _files(root, "*.py"):
        name = path.relative_to(root).as_posix()
        if not re.search(_NOT_LIBRARY, name):
            yield Document(f"Lib/{name}", _read(path), "PSF-2.0")


def _c() -> Iterator[Document]:
    include = Path(sysconfig.get_path("include"))
    for path in _files(include, "*.h"):
        yield Document(f"Include/{path.relative_to(include).as_posix()}", _read(path), "PSF-2.0")
    system = Path("/usr/include")
    licences = {"zlib.h": "Zlib", "expat.h": "MIT", "expat_external.h": "MIT"}
    for path in _files(system, "*.h"):
        name = path.relative_to(system).as_posix()
        if re.match(r"(c\+\+|llvm|node|unicode|python|google|absl)", name) or not _is_c(text := _read(path)):
            continue
        yield Document(f"include/{name}", text, licences.get(name, ""))


def _is_c(text: str) -> bool:
    return not re.search(r"^\s*(namespace|template\s*<|class\s+\w+\s*[:{])", text, re.M)


def _page_licence(name: str, source: str) -> str:
    """The licence of a manual page, when the page itself or its project's notice states a permissive one."""
    head = source[:4000]
    if re.search(r"SPDX-License-Identifier:\s*(MIT|0BSD|BSD-[23]-Clause)\b", head):
        found = re.search(r"SPDX-License-Identifier:\s*(\S+)", head)
        return found.group(1) if found else ""
    if re.search(r"Source:\s+shadow.utils", head):
        return "BSD-3-Clause"
    return "public domain (XZ Utils)" if re.match(r"(xz|xzdec|lzmainfo)\.1$", name) else ""


def _manual_pages(root: Path, sections: str) -> Iterator[Document]:
    for path in _files(root, "*.gz"):
        folder = path.parent.name
        if path.parent.parent != root or not re.fullmatch(f"man[{sections}]", folder):
            continue
        if path.name.startswith("gcloud"):  # not free, and seventeen thousand pages of it where it is installed
            continue
        source = _read(path)
        name = f"{folder}/{path.name.removesuffix('.gz')}"
        yield Document(name, plain_text(source), _page_licence(path.name.removesuffix(".gz"), source))


def _language_reference() -> Iterator[Document]:
    """The Python language reference, which the standard library carries as a dictionary of topics."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    if path.is_file():
        tree = ast.parse(_read(path))
        value = next(n.value for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign) and n.value)
        for topic, text in sorted(ast.literal_eval(value).items()):
            yield Document(f"pydoc_data/{topic}", text, "PSF-2.0")


def _english() -> Iterator[Document]:
    yield from _language_reference()
    yield from _manual_pages(_MAN, "1-8")


_GERMAN = re.compile(
    r"\b(der|die|das|und|ist|nicht|ein|eine|einen|wird|werden|mit|von|zu|für|auf|den|dem|des|im|als|oder|kann|wenn|dass"
    r"|sind|diese|dieser|bei|nur|aus|kein|keine|konnte|ungültig|ungültige|fehler|datei)\b",
    re.I,
)
_ENGLISH = re.compile(r"\b(the|of|to|is|and|this|be|for|in|that|are|with|not|can|if|it|will|by|from)\b", re.I)


def _is_german(text: str) -> bool:
    return len(_GERMAN.findall(text)) > len(_ENGLISH.findall(text))


def _catalogue(path: Path) -> list[str]:
    """The translated messages of a GNU gettext ``.mo`` file (both byte orders), in file order."""
    raw = path.read_bytes()
    order = {0x950412DE: "<", 0xDE120495: ">"}.get(struct.unpack("<I", raw[:4])[0])
    if order is None:
        return []
    count, _, start = struct.unpack(f"{order}III", raw[8:20])
    texts: list[str] = []
    for row in range(count):
        length, offset = struct.unpack_from(f"{order}II", raw, start + 8 * row)
        texts.append(raw[offset : offset + length].split(b"\0")[0].decode("utf-8", "replace"))
    return [t for t in texts[1:] if len(t) >= 24 and "�" not in t]


_PERMISSIVE_CATALOGUES = ((r"(postgres|psql|libpq|pg_|initdb|pgscripts|plpgsql|ecpg|pl)", "PostgreSQL"),
                          (r"mit-krb5", "BSD-2-Clause"), (r"xz", "public domain (XZ Utils)"))  # fmt: skip


def _messages(language: str) -> Iterator[Document]:
    """Message catalogues, cut into documents of about 4 kB."""
    for path in _files(_LOCALE / language / "LC_MESSAGES", "*.mo"):
        if path.name.startswith("iso_"):
            continue
        stem = path.name.removesuffix(".mo")
        licence = next((spdx for prefix, spdx in _PERMISSIVE_CATALOGUES if re.match(prefix, stem)), "")
        block: list[str] = []
        part = 0
        for message in [*filter(_is_german, _catalogue(path)), ""]:
            block.append(message)
            if block and (not message or sum(map(len, block)) > 4000):
                yield Document(f"messages/{stem}/{part}", "\n".join(block).strip() + "\n", licence)
                block, part = [], part + 1


def _german() -> Iterator[Document]:
    for page in _manual_pages(_MAN / "de", "1-8"):
        kept = [p for p in page.text.split("\n\n") if _is_german(p) or len(p) < 40]
        yield Document(f"de/{page.name}", "\n\n".join(kept) + "\n", page.licence)
    yield from _messages("de")


_COLLECTORS: dict[str, Callable[[], Iterator[Document]]] = {
    "english": _english, "python": _python, "c": _c, "german": _german
}  # fmt: skip


def collect(domain: str) -> list[Document]:
    """Every document of ``domain``, each text once, ordered by the digest of its name, capped in bytes.

    The order depends on names alone, so another file on the machine does not reshuffle the rest.

    Raises:
        ResourceError: the machine has less than 600 kB of this domain; says what to install.
    """
    seen: set[str] = set()
    chosen: list[Document] = []
    total = 0
    for document in sorted(_COLLECTORS[domain](), key=lambda d: d.digest):
        key = hashlib.sha256(document.text.encode()).hexdigest()
        if key in seen or len(document.text) < 200:
            continue
        seen.add(key)
        chosen.append(document)
        total += len(document.text.encode())
        if total >= _MAXIMUM_BYTES[domain]:
            break
    if total < _MINIMUM_BYTES:
        raise ResourceError(
            f"only {total:,} bytes of {domain} text found",
            where="examples/zoo",
            why=f"{_MINIMUM_BYTES:,} are needed to train",
            fix=_INSTALL[domain],
        )
    return chosen
