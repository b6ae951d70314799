"""The files of a tuning run: the table, and the readings where they are asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..engine import paths, table_files, tables
from ..errors import UserError, first_line
from ..files import check_writable
from .tasks import Row

READINGS_EVERY = 10.0  # seconds after which readings are written again; the table is written after every row


class Output:
    """The files of a tuning: what they held before, and what is written, each whole or not at all.

    Args:
        path: the file of the table.
        readings: the file of the readings; None: they are not written.
        empty: a table without rows, with the device and versions of this run.
        report: called with a sentence about rows that are dropped.
        now: a clock, in seconds.

    Raises:
        UserError: a file cannot be written, or holds something else.
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
        self.old = _existing(path, empty, "--out", report)
        before = replace(empty, readings=True)
        self.old_readings = before if readings is None else _existing(readings, before, "--readings", report)
        self.written = now()

    def table(self, rows: list[Row]) -> table_files.Table:
        """The rows of this run, and those from before that it has not measured again."""
        return tables.merge(self.old, _filled(self.empty, rows))

    def save(self, rows: list[Row], readings: list[Row], asked: int) -> str:
        """Write the rows measured so far, and return a sentence about them."""
        if not rows:
            return f"nothing was measured; {self.path} is as it was"
        _write(self.path, self.table(rows))
        paths.forget_tables()
        written = f"{len(rows)} of {asked} problems were measured, and are in {self.path}"
        if self.readings_path is None:
            return written
        _write(self.readings_path, self._all_readings(readings))
        return f"{written}; {len(readings)} readings are in {self.readings_path}"

    def keep(self, rows: list[Row], readings: list[Row]) -> None:
        """Write the rows measured so far, without a sentence: a process whose kernel hangs can only be killed."""
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
        raise UserError(f"cannot write {path}: {first_line(error)}; what was there before is as it was") from None


def _existing(path: Path, empty: table_files.Table, flag: str, report: Callable[[str], None]) -> table_files.Table:
    """The rows of a flag's file that still hold. Raises an error at once if the file cannot be written."""
    try:
        old = table_files.read(path)
    except FileNotFoundError:
        old = empty
    except ValueError as error:
        raise UserError(f"{error}, so it will not be overwritten; delete it, or name another with {flag}") from None
    if old.device != empty.device:
        raise UserError(f"{path} was measured on {old.device}, this is {empty.device}; name another file with {flag}")
    if old.readings != empty.readings:
        holds = "readings of every tile" if old.readings else "a table"
        raise UserError(f"{path} holds {holds}; name another file with {flag}")
    try:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {path.resolve().parent}, the folder of {flag}: {error.strerror}") from None
    check_writable(path, flag)
    if old.versions == empty.versions:
        return old
    names = [name for name in {**old.versions, **empty.versions} if old.versions.get(name) != empty.versions.get(name)]
    then, today = (", ".join(f"{name} {table.versions.get(name, 'none')}" for name in names) for table in (old, empty))
    if old.readings:
        raise UserError(f"{path} was measured with {then}, this is {today}; name another file with {flag}")
    report(f"{path} was measured with {then}; this is {today}, so its {len(old.rows)} rows are dropped")
    return empty
