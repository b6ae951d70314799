"""Compile kernels ahead in separate processes, into Triton's cache on disk, from which another process loads them.

A compiling process does not use the GPU and creates no context on it. It replaces Triton's driver by the target to
compile for, and every launch by `kernel.warmup`, which compiles the kernel that the launch would run, under the same
key. Its work ends in launches on tensors of the device "meta", which have shapes but no memory.

It runs at the same time as the process that measures, which times by device events. The timed calls wait on the GPU
behind a kernel that spins until the host has issued all of them. Compiling must not delay the host for longer than this
kernel spins. So two cores are left free, and the compiling processes have a low priority (`NICENESS`). With one core
there are no compiling processes. A kernel is then compiled at its first launch, before it is timed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from .errors import first_line
from .kernels import devices
from .kernels.language import driver
from .kernels.launch import Launch, launched_by
from .processes import Worker

__all__ = ["Compilers", "NotYetError", "count_workers"]

MOST_WORKERS = 16  # each holds a few hundred MB
FREE_CORES = 2
NICENESS = 10


class NotYetError(Exception):
    """A kernel was not compiled in time."""


def count_workers() -> int:
    """The number of compiling processes for this machine; 0 if it has one core or is not a POSIX system."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    cores = len(os.sched_getaffinity(0))
    return 0 if cores == 1 else max(1, min(MOST_WORKERS, cores - FREE_CORES))


class Compilers:
    """Processes that compile work in the order of the requests. They end with the `with` block.

    Args:
        compile: a function at the top level of a module, which the processes call with each piece of work.
        device: the device to compile for.
        target: the same device as Triton's target.
        workers: the number of processes; 0: nothing is compiled ahead, and `wait` returns at once.
        serve: the function that a process runs. Its arguments are the process's end of a pipe, `compile`, `device` and
            `target`.

    Attributes:
        failure: the reason why some work, or all later work, was not compiled ahead.
    """

    def __init__(
        self,
        compile: Callable[[Any], None],
        device: devices.Device,
        target: Any,
        workers: int,
        serve: Callable[..., None] | None = None,
    ) -> None:
        self.failure: str | None = None
        self._serve = serve or _serve
        self._arguments = (compile, device, target)
        self._waiting: dict[Hashable, Any] = {}
        self._asked: set[Hashable] = set()
        self._outcomes: dict[Hashable, str | None] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._working = workers
        self._workers: list[Worker] = []
        self._threads = [threading.Thread(target=self._drive, daemon=True) for _ in range(workers)]

    def __enter__(self) -> Compilers:
        if self._threads:
            resource_tracker.ensure_running()  # if a thread started it later, it would unblock Ctrl-C there
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            for worker in self._workers:
                worker.kill()
        for thread in self._threads:
            thread.join()

    def ask(self, work: Mapping[Hashable, Any], first: bool = False) -> None:
        """Append work to the waiting work; with `first`, put it in front. A key is compiled only once."""
        with self._changed:
            if self._working:
                new = {key: piece for key, piece in work.items() if key in self._waiting or key not in self._asked}
                self._asked |= work.keys()
                self._waiting = {**new, **self._waiting} if first else {**self._waiting, **new}
                self._changed.notify_all()

    def wait(self, key: Hashable, seconds: float) -> str | None:
        """Wait until a piece of work is compiled. It is moved to the front of the waiting work.

        Returns:
            None; or the reason not to launch it, if a process died while it compiled this work. Work that failed to
            compile in another way, or was not requested, is compiled at its launch, which raises its error.

        Raises:
            NotYetError: it was not compiled within `seconds`.
        """
        with self._changed:
            if key in self._waiting:
                self._waiting = {key: self._waiting.pop(key), **self._waiting}
            if key in self._asked and not self._changed.wait_for(lambda: key in self._outcomes, max(0.0, seconds)):
                raise NotYetError
            return self._outcomes.get(key)

    def _drive(self) -> None:
        """Run a thread that gives one process a piece of work at a time. If the process dies, start another one."""
        # The new process inherits this: only the measuring process handles Ctrl-C.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        worker, serves = self._start()
        while serves:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._ended:
                    break
                key = next(iter(self._waiting))
                work = self._waiting.pop(key)
            died, outcome = False, None
            try:
                worker.connection.send(work)
                self.failure = worker.connection.recv() or self.failure
            except (EOFError, OSError):
                died = True
                worker.process.join()
                outcome = f"the process that compiled it ended with status {worker.process.exitcode}"
            with self._changed:
                self._outcomes[key] = outcome
                self._changed.notify_all()
            if died:
                worker, serves = self._start()
        worker.process.join()
        with self._changed:
            self._working -= 1
            if not self._working and not self._ended:
                self.failure = (
                    f"the processes that compile do not start: they end with status {worker.process.exitcode}"
                )
                self._outcomes |= dict.fromkeys(self._waiting)
                self._waiting.clear()
                self._changed.notify_all()

    def _start(self) -> tuple[Worker, bool]:
        """Start a process. Return it, and True if it is ready for work; False if it ended before."""
        with self._changed:  # or `__exit__` might miss it
            worker = Worker(self._serve, *self._arguments, daemon=True)
            self._workers.append(worker)
            if self._ended:
                worker.kill()
        try:
            worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            return worker, False
        return worker, True


def _serve(connection: Connection, compile: Callable[[Any], None], device: devices.Device, target: Any) -> None:
    """Run the compiling process: receive work, send None or the error. It ends when the other side does."""
    os.nice(NICENESS)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # compilers would write into the progress bar
        os.dup2(nowhere, stream)
    with compile_only(device, target):
        connection.send(None)  # tells the other side that the process runs
        while True:
            try:
                work = connection.recv()
            except EOFError:
                return
            failure = None
            try:
                compile(work)
            except Exception as error:  # compilers raise many classes of errors
                failure = f"{type(error).__name__}: {first_line(error)}"
            connection.send(failure)


@contextlib.contextmanager
def compile_only(device: devices.Device, target: Any) -> Iterator[None]:
    """Within the block, this process has one device, which compiles and launches nothing."""
    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
        )
    )
    with devices.pretended(device), launched_by(_compile):
        yield


def _compile(launch: Launch, tensors: Any) -> None:
    launch.kernel.warmup(*tensors, *launch.scalars, grid=(launch.programs,), **launch.constants)
