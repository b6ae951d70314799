"""The files of a tuning run: the table and, with --readings, the readings."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..engine import paths, table_files, tables
from ..errors import UserError, first_line
from ..files import check_writable, resolved
from .tasks import Row

READINGS_EVERY = 10.0  # seconds between writes of the readings; the table is written after every row


class Output:
    """The files of a tuning run: their old rows, and methods that write new ones atomically.

    Args:
        path: the file of the table.
        readings: the file of the readings, or None.
        empty: a table without rows, with the device and versions of this run.
        report: called with a sentence about rows that are dropped.
        now: a clock, in seconds.

    Raises:
        UserError: a file cannot be written, exists and has other content, or is given for both.
    """

    def __init__(
        self,
        path: Path,
        readings: Path | None,
        empty: table_files.Table,
        report: Callable[[str], None],
        now: Callable[[], float],
    ) -> None:
        self.path, self.readings_path, self.empty = path, readings, empty
        self.now = now
        if readings is not None and resolved(readings, "--readings") == resolved(path, "--out"):
            raise UserError(f"--readings is {readings}, the file of the table; it needs to be another file")
        self.old = _existing(path, empty, "--out", report)
        empty_readings = replace(empty, readings=True)
        self.old_readings = (
            empty_readings if readings is None else _existing(readings, empty_readings, "--readings", report)
        )
        self.written = now()

    def table(self, rows: list[Row]) -> table_files.Table:
        """Return a table of this run's rows, and of the old rows that it has not measured again."""
        return tables.merge(self.old, _filled(self.empty, rows))

    def save(self, rows: list[Row], readings: list[Row], problems: int) -> str:
        """Write the rows and readings, and return a sentence about them. `problems` is the number of all problems."""
        if not rows:
            return f"nothing was measured; {self.path} is unchanged"
        _write(self.path, self.table(rows))
        paths.forget_tables()
        sentence = f"measured {len(rows)} of {problems} problems; the table is {self.path}"
        if self.readings_path is None:
            return sentence
        _write(self.readings_path, self._all_readings(readings))
        return f"{sentence}; {len(readings)} readings are in {self.readings_path}"

    def keep(self, rows: list[Row], readings: list[Row]) -> None:
        """Write the rows and readings during the run, because a process with a hanging kernel can only be killed."""
        with contextlib.suppress(OSError):  # `save` reports it
            table_files.write(self.path, self.table(rows))
            if self.readings_path is not None and self.now() - self.written >= READINGS_EVERY:
                table_files.write(self.readings_path, self._all_readings(readings))
                self.written = self.now()

    def _all_readings(self, readings: list[Row]) -> table_files.Table:
        return tables.merge(self.old_readings, _filled(replace(self.empty, readings=True), readings))


def _filled(empty: table_files.Table, rows: list[Row]) -> table_files.Table:
    gemms = tuple(row for row in rows if isinstance(row, table_files.Gemm))
    networks = tuple(row for row in rows if isinstance(row, table_files.Network))
    return replace(empty, gemms=gemms, networks=networks)


def _write(path: Path, table: table_files.Table) -> None:
    try:
        table_files.write(path, table)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {first_line(error)}; the old file, if any, is unchanged") from None


def _existing(path: Path, empty: table_files.Table, flag: str, report: Callable[[str], None]) -> table_files.Table:
    """Return the valid old rows of a flag's file. Raises UserError if the file cannot be written or used."""
    try:
        old = table_files.read(path)
    except FileNotFoundError:
        old = empty
    except ValueError as error:
        raise UserError(f"{error}, so it will not be overwritten; delete it, or use another file for {flag}") from None
    if old.device != empty.device:
        raise UserError(
            f"{path} was measured on {old.device}, but this GPU is {empty.device}; use another file for {flag}"
        )
    if old.readings != empty.readings:
        content = "readings of every tile" if old.readings else "a table"
        raise UserError(f"{path} has {content}; use another file for {flag}")
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {path.resolve().parent}, the folder of {flag}: {error.strerror}") from None
    check_writable(path, flag)
    if old.versions == empty.versions:
        return old
    names = [name for name in {**old.versions, **empty.versions} if old.versions.get(name) != empty.versions.get(name)]
    before, now = (", ".join(f"{name} {table.versions.get(name, 'none')}" for name in names) for table in (old, empty))
    if old.readings:
        raise UserError(f"{path} was measured with {before}, but here is {now}; use another file for {flag}")
    report(f"{path} was measured with {before}, but here is {now}; its {len(old.rows)} rows are dropped")
    return empty
