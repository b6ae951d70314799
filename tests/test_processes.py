"""Child processes: workers with a pipe, and modules that print JSON."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from mlp_fused.processes import Worker, run_json


def echo(connection: Connection, prefix: str) -> None:
    """Send each message back until the pipe is closed."""
    with contextlib.suppress(EOFError):
        while True:
            connection.send(f"{prefix} {connection.recv()}")


def lead_a_group(connection: Connection) -> None:
    """Lead a new process group with a child in it, send the child's process id, and never end."""
    os.setsid()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    connection.send(child.pid)
    time.sleep(600)


def is_running(pid: int) -> bool:
    """False for a process that has ended, even if nothing has waited for it yet."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_answers_and_ends_when_its_pipe_is_closed() -> None:
    worker = Worker(echo, "heard")
    worker.connection.send("this")
    assert worker.connection.recv() == "heard this"
    worker.close(grace=60)
    assert worker.process.exitcode == 0


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_worker_that_does_not_end_is_killed_with_its_group() -> None:
    worker = Worker(lead_a_group)
    child = worker.connection.recv()
    assert is_running(child)
    worker.close(grace=0.1)
    assert worker.process.exitcode == -9
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child)


def test_run_json_returns_a_modules_json_or_raises_its_error(tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(
        "import sys\nprint('first')\nsys.exit(sys.argv[1]) if sys.argv[1:] else print('[1]')"
    )
    assert run_json("prints", environment=os.environ, folder=tmp_path) == [1]
    with pytest.raises(RuntimeError, match="^the process failed: no such thing$"):
        run_json("prints", "no such thing", environment=os.environ, folder=tmp_path)
    (tmp_path / "ends.py").write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="^the process failed: status 3$"):
        run_json("ends", environment=os.environ, folder=tmp_path)
