"""Requests to the Hub: what passes is tried again, with pauses that grow; what does not is said in words, at once.

A server that is busy or gone (408, 429, 5xx), a connection that breaks and a file that arrives cut short pass. After
`ATTEMPTS` tries the run ends with a `ResourceError`: the same command resumes it. A model that is missing, gated or
has no such revision does not pass, and neither does offline mode: `CheckpointError`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from mergekit_lr.checkpoint.reference import Place
from mergekit_lr.errors import CheckpointError, MergekitLrError, ResourceError

ATTEMPTS = 6
FIRST_PAUSE, LONGEST_PAUSE, MOST_PATIENCE = 1.0, 30.0, 300.0
"""Seconds: after the first failure, the most that doubling leads to, the most that a server may ask for."""

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
OFFLINE = "HF_HUB_OFFLINE"
YES = frozenset({"1", "ON", "YES", "TRUE"})
"""What huggingface_hub takes for a yes in a setting, in any case of letters."""
GETTING = "get the model"

T = TypeVar("T")


class Interrupted(Exception):
    """A transfer that ended early; it may go on where it stopped."""


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """No request to the Hub by anything in this process while it lasts; the cache alone is used.

    huggingface_hub reads its setting once, when it is imported, so both the setting and what was read of it change.
    """
    if not wanted:
        yield
        return
    before = os.environ.get(OFFLINE)
    os.environ[OFFLINE] = "1"
    constants = sys.modules.get("huggingface_hub.constants")
    was = getattr(constants, OFFLINE, None)
    if constants is not None:
        setattr(constants, OFFLINE, True)
    try:
        yield
    finally:
        if before is None:
            del os.environ[OFFLINE]
        else:
            os.environ[OFFLINE] = before
        now = sys.modules.get("huggingface_hub.constants")
        if now is not None:
            setattr(now, OFFLINE, was if constants is not None else str(before).upper() in YES)


def is_offline() -> bool:
    """Whether huggingface_hub was told to make no request."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def patiently(place: Place, call: Callable[[], T], *, hint: str = "", doing: str = GETTING) -> T:
    """What ``call`` returns, tried again while what it raises may pass.

    Raises:
        CheckpointError: the Hub says no, or the machine is offline and the cache has not got it.
        ResourceError: it did not get through in `ATTEMPTS` tries; run the same command again.
    """
    attempt = 1
    while True:
        try:
            return call()
        except MergekitLrError:
            raise
        except Exception as e:
            wait = _pause(e, attempt)
            if wait is None:
                raise in_words(e, place, hint, doing) from e
            if attempt == ATTEMPTS:
                raise ResourceError(
                    f"cannot {doing}",
                    where=str(place),
                    why=f"{_lead(doing)}{_reason(e)}; {ATTEMPTS} attempts{hint}",
                    fix="run the same command again later: what is done is kept",
                ) from e
        time.sleep(wait)
        attempt += 1


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__, seen + 1


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _pause(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before the next try; None where it would not help."""
    from huggingface_hub import errors

    usual = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempt - 1))
    for e in _chain(error):
        if isinstance(e, errors.OfflineModeIsEnabled):
            return None
        status = _status(e)
        if status is not None:
            return max(usual, _asked(e)) if status in TRANSIENT else None
        if isinstance(e, Interrupted | ConnectionError | TimeoutError | errors.HTTPError):  # type: ignore[attr-defined]
            return usual
    # huggingface_hub found nothing in the cache after a request that it does not name; its own checks have no errno.
    passing = isinstance(error, errors.LocalEntryNotFoundError) or (isinstance(error, OSError) and error.errno is None)
    return None if is_offline() or not passing else usual


def _asked(error: BaseException) -> float:
    """Seconds that a server's Retry-After asks for, as a number or as a date."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("Retry-After", "")).strip()
    if not text:
        return 0.0
    try:
        seconds = float(text) if text.replace(".", "", 1).isdigit() else _until(text)
    except (ValueError, TypeError, IndexError):
        return 0.0
    return min(MOST_PATIENCE, max(0.0, seconds))


def _until(date: str) -> float:
    when = parsedate_to_datetime(date)
    return (when - datetime.now(when.tzinfo or UTC)).total_seconds()


def _lead(doing: str) -> str:
    """A name that may be a path is taken for a Hub id only because there is no such path."""
    return "no such local path, and " if doing == GETTING else ""


def _reason(error: BaseException) -> str:
    for e in _chain(error):
        status = _status(e)
        if status is not None:
            return f"the Hub answered {status}"
        if isinstance(e, Interrupted):
            return str(e)
    return "the Hub cannot be reached and the cache has not got it"


def in_words(error: BaseException, place: Place, hint: str, doing: str) -> MergekitLrError:
    """A refusal as an error that says what to do."""
    from huggingface_hub import errors

    def failed(why: str, fix: str) -> CheckpointError:
        return CheckpointError(f"cannot {doing}", where=str(place), why=f"{_lead(doing)}{why}{hint}", fix=fix)

    chain = list(_chain(error))
    first = next((e for e in chain if isinstance(e, errors.HfHubHTTPError)), error)
    if isinstance(first, errors.GatedRepoError):
        return failed("on the Hub it is gated", "ask for access on its page, and set HF_TOKEN")
    if isinstance(first, errors.RevisionNotFoundError):
        return failed(f"the Hub has no revision {place.revision!r} of it", "check the revision")
    if isinstance(first, errors.RepositoryNotFoundError | errors.HFValidationError):
        return failed("the Hub has no such model, or shows it only to some", "check the name, or set HF_TOKEN")
    if isinstance(first, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return failed(
            "HF_HUB_OFFLINE is set or --offline given, and the cache has not got it", "leave it out once to download"
        )
    status = _status(first)
    if status in (401, 403):
        return failed(f"the Hub refused ({status})", "check what the token may do, and set HF_TOKEN")
    if status is not None:
        return failed(f"the Hub answered {status}", "check the name and the revision")
    if isinstance(first, OSError):
        why = f"its files could not be stored ({first.strerror or type(first).__name__})"
        return ResourceError(f"cannot {doing}", where=str(place), why=why, fix="check the cache's disk")
    raise error
