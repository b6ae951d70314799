"""Child processes: a worker that gets jobs through a pipe, and a module that prints JSON."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Worker", "run_json"]

PATIENCE = 300  # seconds: the time limit of `run_json`


class Worker:
    """A spawned process that runs `serve(connection, *arguments)`, with a pipe to it.

    Args:
        serve: a function at the top level of a module. When this side closes the pipe, `connection.recv()` raises
            EOFError, and `serve` must return.
        daemon: True to end the process together with this one. It cannot start processes then.

    Attributes:
        process: the process.
        connection: this side of the pipe.
    """

    def __init__(self, serve: Callable[..., None], *arguments: Any, daemon: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=daemon)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        """Kill the process, and its group if it leads one."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Kill the group only if `serve` has already made the process its leader.
            if self.process.pid is not None and os.getpgid(self.process.pid) == self.process.pid:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    def close(self, grace: float = 1.0) -> None:
        """Close the pipe, which ends the process. Kill the process if it still runs after `grace` seconds."""
        self.connection.close()
        self.process.join(grace)
        if self.process.is_alive():
            self.kill()
            self.process.join()


def run_json(module: str, *arguments: str, environment: Mapping[str, str], folder: Path | None = None) -> Any:
    """Run `python -m module *arguments` in a new process, and return the JSON in the last line that it prints.

    Args:
        environment: all environment variables of the process.
        folder: the working directory; by default the current one.

    Raises:
        RuntimeError: the process failed, or did not end within `PATIENCE` seconds.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        child = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the process did not end within {PATIENCE} s") from None
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        raise RuntimeError(f"the process failed: {lines[-1] if lines else f'status {child.returncode}'}")
    return json.loads(child.stdout.splitlines()[-1])
