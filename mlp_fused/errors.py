"""The user's mistakes, and the words that their sentences share."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["UserError", "count", "first_line", "listed"]


class UserError(Exception):
    """A mistake that the user can fix: one sentence that says what was found and what is needed."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


def listed(names: Iterable[object], most: int | None = None) -> str:
    """Names as a sentence lists them, the first `most` of them; "none" if there are none."""
    words = [str(name) for name in names]
    return ", ".join(words[:most] + ["..."] * (most is not None and len(words) > most)) or "none"


def count(number: float, noun: str, form: str = "") -> str:
    """A whole number with its noun, in the plural unless the number is 1; `form` is "," for thousands set apart."""
    return f"{round(number):{form}} {noun}{'s' * (round(number) != 1)}"
