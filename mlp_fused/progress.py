"""A progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

__all__ = ["progress"]

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """The items, with a progress bar where there is a terminal to draw it on, and tqdm to draw it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    shown: Iterable[Item] = tqdm(items, desc=description, leave=False, disable=None)  # None: if stderr is no terminal
    return shown
