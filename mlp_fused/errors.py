"""Errors for users' mistakes: the helpers that their messages share, and the checks of numbers."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["UserError", "count", "first_line", "listed", "real_number", "whole_number"]


class UserError(Exception):
    """A mistake that the user can fix. Its message is one sentence with the wrong value and the right ones."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


def listed(names: Iterable[object], most: int | None = None) -> str:
    """The first `most` names, joined by commas; "none" if there are none."""
    words = [str(name) for name in names]
    return ", ".join(words[:most] + ["..."] * (most is not None and len(words) > most)) or "none"


def count(number: float, noun: str, form: str = "") -> str:
    """A whole number with its noun, in the plural unless the number is 1; `form` "," separates thousands."""
    return f"{round(number):{form}} {noun}{'s' * (round(number) != 1)}"


def whole_number(value: Any) -> int | None:
    """`value` as a Python int, or None if it is not a whole number.

    Whole numbers are NumPy's integers, 0-d arrays and 0-d tensors of integers, and any object with `__index__` except a
    bool.
    """
    value = _python_number(value)
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def real_number(value: Any) -> float | None:
    """`value` as a Python float, or int if it is whole by its type; None if it is not a real number, or a bool."""
    whole = whole_number(value)
    value = _python_number(value)
    if whole is not None or isinstance(value, bool):
        return whole
    return float(value) if isinstance(value, numbers.Real) else None


def _python_number(value: Any) -> Any:
    """The Python number in a NumPy scalar, a 0-d array or a 0-d tensor; any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
