"""Numbers, tables and pictures in the Markdown of reports."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

NONE = "-"  # stands for a number that was not measured


def number(value: float | None) -> str:
    """Three digits, or all that stand before the point."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".removesuffix(".")


def times(value: float | None) -> str:
    """A ratio: two digits after the point below 2, one from there on."""
    return NONE if value is None else f"{value:.2f}x" if value < 1.995 else f"{value:.1f}x"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in row)} |"
    yield ""


def folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Lines that a page shows when asked for."""
    yield f"<details><summary>{title}</summary>"
    yield ""
    yield from lines
    yield "</details>"
    yield ""


def picture(light: str, dark: str, alt: str) -> str:
    """A picture that goes with a light and with a dark page, and the words for it."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(alt)}"></picture>'
    )
