"""Child processes: a worker that is sent jobs through a pipe, and a module that prints JSON."""

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

PATIENCE = 300  # seconds for a module that prints JSON


class Worker:
    """A spawned process that runs `serve(connection, *arguments)`, and our end of the pipe to it.

    Args:
        serve: a function at the top of a module. It ends when `connection` is closed, which raises EOFError.
        daemon: the process ends with this one, and may not have processes of its own.

    Attributes:
        process: the process.
        connection: our end of the pipe.
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
            # `serve` may make it the leader of a group; before that, the process alone has to end.
            if self.process.pid is not None and os.getpgid(self.process.pid) == self.process.pid:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    def close(self, grace: float = 1.0) -> None:
        """Close the pipe, which ends the process; kill it if it still runs after `grace` seconds."""
        self.connection.close()
        self.process.join(grace)
        if self.process.is_alive():
            self.kill()
            self.process.join()


def run_json(module: str, *arguments: str, environment: Mapping[str, str], folder: Path | None = None) -> Any:
    """Run `python -m module` in a process of its own, and return the JSON in the last line that it prints.

    Args:
        environment: the whole environment of the process.
        folder: where it runs; by default here.

    Raises:
        RuntimeError: it failed, or did not end within PATIENCE seconds.
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
