"""Ids of tokens in config.json and generation_config.json: they follow the token, not the number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_lr.tokenizer.vocabulary import NAMED

_ID_KEY = re.compile(r"(?:_token_ids?|_token_index)$")
_MORE_KEYS = ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids", "bad_words_ids", "force_words_ids")
IN_EVERY_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id")
NAMED_IDS = tuple(f"{name}_id" for name in NAMED)


@dataclass(frozen=True)
class Renaming:
    """How ids of one model are called in the output.

    ``own``: the tokens that the ids stood for; ``ids``: the output's. ``named``: where the output's tokenizer is
    another model's, its `NAMED` tokens by name, and ``theirs`` that model's config; both None otherwise.
    """

    own: Mapping[str, int]
    ids: Mapping[str, int]
    named: Mapping[str, str] | None = None
    theirs: Mapping[str, Any] | None = None

    @property
    def changes_nothing(self) -> bool:
        return self.named is None and all(self.ids.get(t) == i for t, i in self.own.items())

    def config(self, config: Mapping[str, Any], rows: int) -> tuple[dict[str, Any], list[str]]:
        """A config.json for the output's tokens, and warnings. ``vocab_size`` becomes the rows, wherever it stands."""
        out, warnings = self.apply(config, "config.json", self.theirs)
        nested = out.get("text_config")
        if isinstance(nested, dict) and "vocab_size" in nested:
            out["text_config"] = {**nested, "vocab_size": rows}
        if "vocab_size" in out or "text_config" not in out:
            out["vocab_size"] = rows
        if self.named is not None:  # what a config leaves out has a default of the architecture's own
            at = out["text_config"] if isinstance(nested, dict) else out
            known = out.keys() | (nested or {}).keys() if isinstance(nested, dict) else out.keys()
            adopted = self._adopted(self.theirs)
            at |= {k: adopted[k] for k in IN_EVERY_CONFIG if k in adopted.keys() - known}
        return out, warnings

    def apply(
        self, config: Mapping[str, Any], what: str, theirs: Mapping[str, Any] | None
    ) -> tuple[dict[str, Any], list[str]]:
        """A config with the ids that its tokens have in the output.

        Where the tokenizer is another model's, its beginning, end, padding and other named tokens are that model's
        (``theirs`` is the same file of it): the tokenizer will use those. Every other id is looked up by its string;
        an id whose token the output does not have is dropped, with a warning.
        """
        if self.changes_nothing:
            return dict(config), []
        by_id = {i: t for t, i in self.own.items()}
        adopted = self._adopted(theirs) if self.named is not None else {}
        warnings: list[str] = []
        out: dict[str, Any] = {}
        for key, value in config.items():
            if key in adopted:
                out[key] = adopted[key]
            elif isinstance(value, dict) and key.endswith("_config"):
                out[key], more = self.apply(value, f"{what}: {key}", theirs)
                warnings += more
            elif value is not None and (_ID_KEY.search(key) or key in _MORE_KEYS):
                out[key] = self._renamed(value, by_id)
                if _count(out[key]) < _count(value):
                    warnings.append(f"{what}: {key} {value} has no token in the output, and is dropped")
                    out[key] = out[key] or None
            else:
                out[key] = value
        return out, warnings

    def _renamed(self, value: Any, by_id: Mapping[int, str]) -> Any:
        if isinstance(value, list):
            found = [self._renamed(v, by_id) for v in value]
            return [v for v in found if v is not None]
        if type(value) is not int:
            return value
        return self.ids.get(by_id[value]) if value in by_id else None

    def _adopted(self, theirs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Ids of the named tokens as the tokenizer's own model has them, else by what its tokenizer calls so."""
        found: dict[str, Any] = {}
        for key in NAMED_IDS:
            name = (self.named or {}).get(key.removesuffix("_id"))
            found[key] = (theirs or {}).get(key)
            if found[key] is None and name is not None:
                found[key] = self.ids.get(name)
        return {k: v for k, v in found.items() if v is not None}


def _count(value: Any) -> int:
    """How many ids a value holds."""
    if isinstance(value, list):
        return sum(_count(v) for v in value)
    return 0 if value is None else 1
