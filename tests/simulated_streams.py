"""Simulated streams that detect every missing wait, for the tests of DevicePrefetcher."""

from __future__ import annotations

import collections
import contextlib
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlp_fused import DevicePrefetcher
from mlp_fused.leaves import map_leaves


@dataclass
class Event:
    """An event. It has passed if the stream has reached it, or if it was never recorded, as in CUDA."""

    pending: bool = False
    at: int = -1

    def synchronize(self) -> None:
        assert not self.pending

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@dataclass
class Block:
    """A block of device memory, and the streams that still use it."""

    memory: Tensor
    keepers: set[str] = field(default_factory=set)


class Streams:
    """Streams that delay work as long as possible, or for a random time: the worst case on a GPU.

    Device memory is reused as soon as possible, and its old content is then overwritten.
    """

    device = torch.device("cpu")
    side = "side"

    def __init__(self, eager: Sequence[str] = (), seed: int | None = None) -> None:
        self.queues: dict[str, collections.deque[Callable[[], bool]]] = {
            "side": collections.deque(),
            "consumer": collections.deque(),
        }
        self.eager = eager  # the streams that run their work as early as possible
        self.random = None if seed is None else random.Random(seed)
        self.free: list[Block] = []
        self.blocks: dict[int, Block] = {}  # by address
        self.pinned_at: set[int] = set()
        self.pinned_bytes = 0
        self.now = 0
        self.wrong: list[str] = []

    def give(self, stream: str, work: Callable[[], object]) -> None:
        """Enqueue work, a function that returns False while it has to wait."""
        self.queues[stream].append(lambda: work() is not False)
        self.happen()

    def happen(self) -> None:
        """Let the streams work, as they do while the host does something else."""
        for stream in self.eager:
            while self.step(stream):
                pass
        while self.random and self.random.random() < 0.5:
            self.step(self.random.choice(("side", "consumer")))

    def step(self, stream: str) -> bool:
        queue = self.queues[stream]
        if not queue:
            return False
        self.now += 1
        work = queue.popleft()  # before it runs: it may enqueue work, as freeing memory does
        if not work():
            queue.appendleft(work)
            return False
        return True

    def drain(self, stream: str) -> None:
        """Run all work of a stream, and the work of the other stream for which it waits."""
        other = "side" if stream == "consumer" else "consumer"
        while self.queues[stream]:
            if not self.step(stream):
                assert self.step(other), "both streams wait for each other"

    # The interface that DevicePrefetcher uses

    def current(self) -> str:
        return "consumer"

    def on_side(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def event(self, *, timing: bool = False) -> Event:
        return Event()

    def record(self, event: Event, stream: str) -> None:
        event.pending = True

        def passed() -> None:
            event.pending, event.at = False, self.now

        self.give(stream, passed)

    def wait(self, stream: str, event: Event) -> None:
        self.give(stream, lambda: not event.pending)

    def synchronize(self, event: Event) -> None:
        while event.pending:
            assert self.step("side")
        self.happen()

    def keep(self, moved: Tensor, stream: str) -> None:
        self.blocks[moved.untyped_storage().data_ptr()].keepers.add(stream)

    def pinned(self, nbytes: int) -> Tensor:
        self.pinned_bytes += nbytes
        return self.pin(torch.full((nbytes,), 0xAA, dtype=torch.uint8))

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned_at.add(tensor.untyped_storage().data_ptr())
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned_at

    def is_here(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self.blocks

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.happen()
        nbytes = int(np.prod(size)) * dtype.itemsize
        if self.free:
            block = self.free.pop()
        else:
            block = Block(torch.empty(4096, dtype=torch.uint8))
            self.blocks[block.memory.data_ptr()] = block
        block.keepers.clear()
        tensor = block.memory[:nbytes].view(dtype).as_strided(size, stride)
        weakref.finalize(tensor, self.dropped, block).atexit = False
        return tensor

    def dropped(self, block: Block) -> None:
        """Free a block once the streams that it was recorded for have finished their current work."""
        waiting = set(block.keepers)

        def done(stream: str) -> None:
            waiting.discard(stream)
            if not waiting:
                self.free.append(block)

        if not waiting:
            self.free.append(block)
        for stream in tuple(waiting):
            self.queues[stream].append(lambda stream=stream: done(stream) is None)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target, held, source = target.detach(), weakref.ref(source), source.detach()

        def work() -> None:
            if held() is None:
                self.wrong.append("a copy's source was freed before it was read")
            target.copy_(source)

        self.give("side", work)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        target = self.empty(tensor.shape, tensor.stride(), dtype)
        into, source = target.detach(), tensor.detach()
        self.give("side", lambda: bool(into.copy_(source) is into))
        return target

    # The consumer

    def use(self, batch: Any, expected: Any) -> None:
        """Enqueue kernels that read a batch.

        They run when the stream reaches them, and do not keep its memory alive.
        """
        for number, (tensor, wanted) in enumerate(zip(leaves(batch), leaves(expected), strict=True)):
            here, there = tensor.detach(), wanted.detach().clone()

            def kernel(here: Tensor = here, there: Tensor = there, number: int = number) -> None:
                if not equal(here, there):
                    self.wrong.append(f"tensor {number} is {here.flatten()[:4]}, not {there.flatten()[:4]}")

            self.give("consumer", kernel)


def leaves(batch: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    map_leaves(batch, lambda leaf: tensors.append(leaf) or leaf if isinstance(leaf, Tensor) else leaf)
    return tensors


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def prefetch(loader: Any, streams: Any, depth: int = 2, **options: Any) -> DevicePrefetcher[Any]:
    prefetcher: DevicePrefetcher[Any] = DevicePrefetcher(loader, "cpu", depth, **options)
    prefetcher._streams = streams
    return prefetcher


# Each key says which work is late. Its value lists the other streams, which run their work as early as possible
# (`Streams.eager`).
LATE = {"late copies": ("consumer",), "late compute": ("side",), "both late": ()}
