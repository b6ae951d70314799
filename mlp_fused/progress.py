"""A progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

__all__ = ["progress"]

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """The items, with a progress bar if tqdm is installed and stderr is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    # None: disabled if stderr is not a terminal
    shown: Iterable[Item] = tqdm(items, desc=description, leave=False, disable=None)
    return shown
