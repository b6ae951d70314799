"""Errors for users' mistakes: the helpers that their messages share, and the checks of numbers."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from typing import Any

__all__ = [
    "UserError", "checked_probability", "checked_width", "checked_widths", "count", "first_line", "listed",
    "real_number", "truth", "whole_number",
]  # fmt: skip


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


def truth(value: Any) -> bool | None:
    """`value` as a Python bool, or None if it is not a bool of Python, NumPy or torch."""
    value = _python_number(value)
    return value if isinstance(value, bool) else None


def _python_number(value: Any) -> Any:
    """The Python number in a NumPy scalar, a 0-d array or a 0-d tensor; any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def checked_width(width: object, argument: str) -> int:
    """A width as an int. Raises TypeError or ValueError if it is not a whole number of at least 0."""
    number = whole_number(width)
    if number is None:
        raise TypeError(f"{argument} is {width!r}; it needs to be a whole number, 0 or more")
    if number < 0:
        raise ValueError(f"{argument} is {number}; it needs to be 0 or more")
    return number


def checked_widths(widths: Any, argument: str) -> list[int]:
    """Widths as a list of ints. Raises TypeError or ValueError if there are none, or one is not a width."""
    is_sequence = isinstance(widths, Iterable) and not isinstance(widths, str | bytes)
    if not is_sequence or getattr(widths, "ndim", 1) == 0:  # a 0-d array or tensor has __iter__, which raises
        raise TypeError(
            f"{argument} is {widths!r}; it needs to be a sequence of widths, the output's last, such as [512, 10]"
        )
    checked = [checked_width(width, f"{argument}[{index}]") for index, width in enumerate(widths)]
    if not checked:
        raise ValueError(f"{argument} is empty; it needs one width a layer, the output's last, such as [512, 10]")
    return checked


def checked_probability(probability: object, argument: str) -> float:
    """A probability as a number. Raises TypeError or ValueError if it is not a number from 0 to 1."""
    number = real_number(probability)
    if number is None:
        raise TypeError(f"{argument} is {probability!r}; it needs to be a probability, a number from 0 to 1")
    if not 0 <= number <= 1:
        raise ValueError(f"{argument} is {number}; it needs to be a probability, from 0 to 1")
    return number
