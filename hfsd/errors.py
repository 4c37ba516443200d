"""The few kinds of error a user can meet. Each says what was given, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class HfsdError(Exception):
    """A failure that is reported in one line, without a traceback (exit code 1)."""

    exit_code = 1


class BadRequest(HfsdError):
    """What was asked for cannot be: a wrong recipe, argument, file or model (exit code 2).

    Args:
        rest: what is left of a recipe without its faulty fields, if that is one, so that its facts can be checked too.
    """

    exit_code = 2

    def __init__(self, message: str, rest: Any = None) -> None:
        super().__init__(message)
        self.rest = rest


class Refusal(BadRequest):
    """The request is understood, and carrying it out would give an unsound or overwritten result (exit code 2)."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""
