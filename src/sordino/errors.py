"""The two ways Sordino says no.

``InputError`` is the user's to mend (exit code 2): a missing file, a recipe typo, a group that does not divide.
``SordinoError`` is a failure of the run (exit code 1). Both carry one line that names the thing and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SordinoError(Exception):
    """A run failed; the message is one line. Exit code 1."""

    exit_code = 1


class InputError(SordinoError):
    """What was given cannot be used; the message names it and the remedy in one line. Exit code 2."""

    exit_code = 2


def nearest(name: str, known: Iterable[str], otherwise: str = "", like: float = 0.6) -> str:
    """What a mistyped name may have meant, as the end of a message; ``otherwise`` if nothing known is so much ``like`` it."""
    near = difflib.get_close_matches(name, list(known), 1, like)
    return f"; did you mean '{near[0]}'?" if near else otherwise and f"; {otherwise}"


def reason(error: BaseException) -> str:
    """What went wrong, in one line; a line that only announces the next one takes it along."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith((":", ",")) else 1])
