"""Format numbers, tables and pictures in Markdown, for reports."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence

NONE = "-"  # a number that was not measured


def number(value: float | None) -> str:
    """Format a number with three digits, or more if it has more before the point."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".removesuffix(".")


def times(value: float | None) -> str:
    """Format a ratio, with two digits after the point below 2 and one from 2 on."""
    return NONE if value is None else f"{value:.2f}x" if value < 1.995 else f"{value:.1f}x"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table. The first column is aligned left, the others right."""
    yield f"| {' | '.join(header)} |"
    yield f"|---|{'---:|' * (len(header) - 1)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in row)} |"
    yield ""


def folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a section that is folded until a reader opens it."""
    yield f"<details><summary>{title}</summary>"
    yield ""
    yield from lines
    yield "</details>"
    yield ""


def picture(light: str, dark: str, alt: str) -> str:
    """Return a picture with files for light and for dark pages, and an alt text."""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(alt)}"></picture>'
    )
