"""Write files atomically: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from .errors import UserError, first_line

__all__ = ["check_writable", "resolved", "write_all", "write_whole"]


def write_whole(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`. At any time, `path` is the whole old or new file.

    Raises:
        OSError: the file cannot be written. Errors of `write` are raised too. The old file is then still there.
    """
    path = Path(path).resolve()  # a symbolic link is not replaced; the file that it points to is
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a crash must not leave an empty file under the name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path, flag: str) -> None:
    """Check, before any work is done, that the file of a flag can be written.

    Raises:
        UserError: the path is a folder, no file can be created in its folder, or there can be no such path.
    """
    path = resolved(path, flag)
    try:
        if path.is_dir():
            raise UserError(f"{flag} {path} is a folder; it needs to be a file")
        with open(_temporary(path), "wb"):
            pass
        _temporary(path).unlink()
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}, the folder of {flag}: {error.strerror}") from None


def resolved(path: str | Path, flag: str) -> Path:
    """Return the absolute path of a flag's file, with symbolic links replaced by the files that they point to.

    Raises:
        UserError: there can be no such path.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a loop; ValueError: a NUL in the path
        raise UserError(f"{flag} is {str(path)!r}, which cannot be a file: {first_line(error)}") from None


def _temporary(path: Path) -> Path:
    """A path in the same folder, so that renaming it to `path` is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write these files atomically. No file is replaced until all have been written in full."""
    temporaries = {path.resolve(): _temporary(path.resolve()) for path in files}
    try:
        for temporary, content in zip(temporaries.values(), files.values()):
            temporary.write_bytes(content)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
