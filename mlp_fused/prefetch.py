"""DevicePrefetcher: copy the next batches to the GPU while it computes on the current one.

Batch n goes through slot n mod depth. A slot has pinned memory and an event. Three sequences of work take part:

    host               wait for the slot's event; get the batch from the loader; copy pageable tensors into the slot
    side stream        copy from pinned memory to new device memory; record the slot's event
    consumer's stream  wait for the event; compute

The host waits so that it does not overwrite memory that is still being read. The consumer's stream waits so that it
does not read a batch before it has arrived. Device memory is allocated in the side stream's pool. After the batch is
freed, `record_stream` delays the reuse of its memory until the consumer's stream is done with it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor

from .errors import whole_number
from .leaves import is_on_the_host, map_leaves

__all__ = ["CopyTimer", "DevicePrefetcher", "use_up"]

Batch = TypeVar("Batch")
Cast = Literal["before", "after"]


def _from_loader(name: str) -> Any:
    """A property of DevicePrefetcher that reads the attribute of its loader."""

    def read(prefetcher: DevicePrefetcher[Any]) -> Any:
        try:
            return getattr(prefetcher.loader, name)
        except AttributeError as error:
            kind = type(prefetcher.loader).__name__
            raise AttributeError(
                f"the loader is of type {kind} and has no {name}, which a DataLoader has", name=name, obj=prefetcher
            ) from error

    return property(read, doc=f"`loader.{name}`.")


class DevicePrefetcher(Generic[Batch]):
    """Iterate over the loader's batches on a device. Up to `depth` batches are copied ahead, on a separate stream.

    for x, y in DevicePrefetcher(loader, "cuda"):
        ...

    It gives the loader's batches in the same order, and has the same length. A new loop starts from the first batch. An
    exception of the loader is raised after the batches before it. `dataset`, `sampler`, `batch_size` and
    `batch_sampler` are the loader's. On the CPU batches are passed on unchanged. On a device without streams, such as
    mps, a batch is moved when it is requested.

    Tensors are copied in tuples, namedtuples, lists, mappings, other sequences, dataclasses, PackedSequence and sparse
    tensors. Objects without a method `to` are passed on unchanged. A copy has the strides that `tensor.to(device)`
    gives. A tensor that requires a gradient, a tensor of a subclass, or another object with a method `to` is moved by
    that method when the batch is requested. An object that also has `pin_memory` and `record_stream` is copied ahead.

    Pageable tensors are first copied to pinned memory, which is reused. The calling thread does this while the device
    computes; there is no other thread. A step that waits for the device, as `loss.item()` does, leaves less time for
    it. A loader that pins, such as DataLoader with `pin_memory=True`, uses a thread of its own, and its tensors are
    copied from where they are. A loader that reuses its memory may overwrite a pageable batch at once, and pinned batch
    n when batch n + depth is requested.

    Args:
        loader: any iterable of batches.
        device: for example "cuda" (the current one), "cuda:1" or "cpu".
        depth: the number of batches that are copied ahead, 1 or more. The device's memory has to hold them.
        dtype: the dtype that floating-point tensors are cast to; None for no cast.
        cast: "before" casts on the host before the copy, so that fewer bytes are copied if `dtype` is smaller. "after"
            casts on the device.
        timer: records the time of the copies, and the time that the device waited for them.

    Raises:
        TypeError: `loader` is not iterable, `depth` is not an integer, or `dtype` is not a torch.dtype.
        ValueError: `depth` is below 1, `dtype` is not a floating-point dtype, `cast` is unknown, or torch has no such
            device.
    """

    dataset = _from_loader("dataset")
    sampler = _from_loader("sampler")
    batch_size = _from_loader("batch_size")
    batch_sampler = _from_loader("batch_sampler")

    def __init__(
        self,
        loader: Iterable[Batch],
        device: torch.device | str | int,
        depth: int = 2,
        *,
        dtype: torch.dtype | None = None,
        cast: Cast = "before",
        timer: CopyTimer | None = None,
    ) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(f"loader is of type {type(loader).__name__}; it needs to be an iterable of batches")
        slots = whole_number(depth)
        if slots is None:
            raise TypeError(f"depth is {depth!r}; it needs to be an integer, 1 or more")
        if slots < 1:
            raise ValueError(f"depth is {slots}; it needs to be 1 or more")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype is {dtype!r}; it needs to be a torch.dtype, such as torch.bfloat16")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; it needs to be a floating-point dtype, such as torch.bfloat16")
        if cast not in get_args(Cast):
            raise ValueError(f"cast is {cast!r}; it needs to be one of {', '.join(map(repr, get_args(Cast)))}")
        self.loader = loader
        self.device = _checked(device)
        self.depth = slots
        self.dtype = dtype
        self.cast = cast
        self.timer = timer
        self._streams: _Streams | None = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # the loader's own TypeError where it has none

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        if self._streams is None and _has_streams(self.device):
            self._streams = _streams(self.device)
        if self._streams is None:
            passes = self.device.type == "cpu" and self.dtype is None
            return batches if passes else map(self._move, batches)
        return _Prefetched(batches, self._streams, self.depth, self.dtype, self.cast, self.timer)

    def _move(self, batch: Batch) -> Batch:
        """Move a batch to a device without streams, by the tensors' own `to`."""

        def move(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.to(self.device, _target(leaf, self.dtype))
            return leaf if self.device.type == "cpu" else leaf.to(self.device)

        moved: Batch = map_leaves(batch, move)
        return moved


def _has_streams(device: torch.device) -> bool:
    return device.type != "cpu" and hasattr(getattr(torch, device.type, None), "Stream")


def _checked(name: torch.device | str | int) -> torch.device:
    """The device, with an index if it has streams. Raises ValueError if torch has no such device."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {name!r}; it needs to be one that torch has here, such as cpu or cuda") from None
    missing = f"device is {device}, but torch {torch.__version__} finds no {device.type} device; use cpu"
    if not _has_streams(device):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, ImportError):
            raise ValueError(missing) from None
        return device
    module: Any = torch.get_device_module(device)
    if not module.is_available():
        raise ValueError(missing)
    index = module.current_device() if device.index is None else device.index
    if index >= module.device_count():
        raise ValueError(f"device is {device}; it needs an index below {module.device_count()}, the number of devices")
    return torch.device(device.type, index)


def _target(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor is cast to: `dtype` for a floating-point tensor, its own for others."""
    return tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype


class CopyTimer:
    """The time of a DevicePrefetcher's copies, and the time that the consumer's stream waited for them.

    It records events in both streams. The host waits for them only in `read()`.
    """

    MOST_PENDING = 10_000  # batches whose events are kept before `read` is called

    def __init__(self) -> None:
        self._pending: list[tuple[Any, Any, Any, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Discard all times."""
        self._pending.clear()
        self.batches = 0
        self._copied = self._waited = 0.0

    def add(self, begun: Any, copied: Any, asked: Any, given: Any) -> None:
        """Add a batch's events: around its copy in the side stream, and around the wait in the consumer's stream."""
        self._pending.append((begun, copied, asked, given))
        if len(self._pending) >= self.MOST_PENDING:
            self.read()

    def read(self) -> None:
        """Wait for the recorded events, and add up their times."""
        if self._pending:
            self._pending[-1][-1].synchronize()  # the last event of all
        for begun, copied, asked, given in self._pending:
            self._copied += begun.elapsed_time(copied)
            self._waited += asked.elapsed_time(given)
            self.batches += 1
        self._pending.clear()

    @property
    def copy_ms(self) -> float:
        """The mean time of a batch's copy, in milliseconds."""
        return self._copied / max(1, self.batches)

    @property
    def waited_ms(self) -> float:
        """The mean time that the consumer's stream waited for a batch's copy, in milliseconds."""
        return self._waited / max(1, self.batches)

    @property
    def hidden(self) -> float:
        """The part of the copies' time during which the consumer's stream did not wait, from 0 to 1."""
        return max(0.0, 1 - self._waited / self._copied) if self._copied else 0.0


class _Streams:
    """Streams, events and memory of one device. Tests pass a simulated one that detects data races."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device)
        self.side = self._module.Stream(device)

    def current(self) -> Any:
        return self._module.current_stream(self.device)

    def on_side(self) -> contextlib.AbstractContextManager[Any]:
        """Within the block, work is issued to the side stream, and memory is allocated in its pool."""
        block: contextlib.AbstractContextManager[Any] = self._module.stream(self.side)
        return block

    def event(self, *, timing: bool = False) -> Any:
        return self._module.Event(enable_timing=timing)

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        """Make the stream wait for the event; the host goes on."""
        stream.wait_event(event)

    def synchronize(self, event: Any) -> None:
        """Make the host wait for the event."""
        event.synchronize()

    def keep(self, moved: Any, stream: Any) -> None:
        """Delay the reuse of the tensor's memory, once it is freed, until the present work of the stream is done."""
        moved.record_stream(stream)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def is_here(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=self.device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(dtype)


@functools.cache
def _streams(device: torch.device) -> _Streams:
    """The streams of a device. They are shared by all iterations, because each stream has a memory pool of its own."""
    return _Streams(device)


class _Slot:
    """Pinned memory for one batch. `event` is recorded after the copies from it, and None if there are none."""

    def __init__(self, streams: _Streams) -> None:
        self._streams = streams
        self._memory: list[Tensor] = []  # bytes, one for each tensor of a batch, as large as the largest so far
        self._views: list[tuple[Any, Tensor]] = []  # for each, the last batch's (shape, strides, dtype) and tensor
        self._used = 0
        self.event: Any = None
        self.sources: list[Any] = []  # tensors that the loader pinned, which are copied from where they are

    def wait(self) -> None:
        """Wait until all copies from this memory are done."""
        if self.event is not None:
            self._streams.synchronize(self.event)
            self.event = None
        self.sources.clear()
        self._used = 0

    def stage(self, tensor: Tensor, stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Copy a tensor into the pinned memory, cast to `dtype`. Returns the copy."""
        index, self._used = self._used, self._used + 1
        layout = (tensor.shape, stride, dtype)
        if index == len(self._memory):
            self._memory.append(torch.empty(0, dtype=torch.uint8, device="cpu"))
            self._views.append((None, self._memory[index]))
        if self._views[index][0] != layout:
            nbytes = tensor.numel() * dtype.itemsize
            if self._memory[index].numel() < nbytes:
                self._memory[index] = self._streams.pinned(nbytes)
            view = self._memory[index][:nbytes].view(dtype).as_strided(tensor.shape, stride)
            self._views[index] = (layout, view)
        return self._views[index][1].copy_(tensor)


class _Later:
    """An object that is moved by its own `to`, in the consumer's stream, when its batch is requested."""

    def __init__(self, value: Any, *dtype: torch.dtype) -> None:
        self._value = value
        self._dtype = dtype

    def to(self, device: torch.device) -> Any:
        return self._value.to(device, *self._dtype)


@dataclass
class _Ahead:
    """A batch that is being copied.

    Attributes:
        batch: the batch on the device; its memory is valid after `event`.
        moved: the tensors in it that were allocated in the side stream.
        later: True if the batch has a `_Later`.
        event: recorded after the copies.
        begun: if copies are timed, recorded before the first one.
        has_begun: True once `begun` is recorded.
    """

    batch: Any = None
    moved: list[Any] = field(default_factory=list)
    later: bool = False
    event: Any = None
    begun: Any = None
    has_begun: bool = False


@dataclass
class _Failed:
    """An error that the loader raised, in the queue instead of a batch."""

    error: Exception


class _Prefetched(Iterator[Batch]):
    """One pass over the loader."""

    def __init__(
        self,
        batches: Iterator[Batch],
        streams: _Streams,
        depth: int,
        dtype: torch.dtype | None,
        cast: Cast,
        timer: CopyTimer | None,
    ) -> None:
        self._batches = batches
        self._streams = streams
        self._dtype = dtype
        self._cast = cast
        self._timer = timer
        self._slots = [_Slot(streams) for _ in range(depth)]
        self._turns = itertools.cycle(self._slots)
        self._slot = next(self._turns)
        self._ahead: deque[_Ahead | _Failed] = deque()
        self._ended = False

    def __next__(self) -> Batch:
        self._fill()
        if not self._ahead:
            raise StopIteration
        first = self._ahead.popleft()
        if isinstance(first, _Failed):
            raise first.error
        try:
            batch = self._hand_over(first)
            self._fill()
        except BaseException:  # Ctrl-C while the loader prepared a later batch: this batch comes next
            self._ahead.appendleft(first)
            raise
        return batch

    def __del__(self) -> None:
        """Keep the source of a copy alive until the copy has ended, however the loop was left."""
        if not sys.is_finalizing():
            for slot in getattr(self, "_slots", ()):
                slot.wait()

    def _fill(self) -> None:
        """Take batches from the loader until `depth` are ahead, or the loader raises an error."""
        while len(self._ahead) < len(self._slots) and not self._ended:
            if self._ahead and isinstance(self._ahead[-1], _Failed):
                return
            try:
                self._slot.wait()
                try:
                    batch = next(self._batches)
                except StopIteration:
                    self._ended = True
                    return
                ahead = self._send(batch)
            except Exception as error:
                self._ahead.append(_Failed(error))
                return
            self._ahead.append(ahead)
            self._slot = next(self._turns)

    def _send(self, batch: Batch) -> _Ahead:
        """Issue a batch's copies to the side stream."""
        streams, slot = self._streams, self._slot
        timing = self._timer is not None
        ahead = _Ahead(event=streams.event(timing=timing))
        # Inference mode is off here, because the pinned memory is written again after the consumer has left that mode.
        with torch.inference_mode(False), streams.on_side():
            if timing:
                ahead.begun = streams.event(timing=True)
            try:
                ahead.batch = map_leaves(batch, lambda leaf: self._start(leaf, ahead))
            finally:  # even if a copy fails: the ones before it are under way
                self._begin(ahead)
                streams.record(ahead.event, streams.side)
                slot.event = ahead.event
        return ahead

    def _begin(self, ahead: _Ahead) -> None:
        """Record the event before a batch's first copy, once; the host has staged the tensor by then."""
        if ahead.begun is not None and not ahead.has_begun:
            self._streams.record(ahead.begun, self._streams.side)
            ahead.has_begun = True

    def _start(self, leaf: Any, ahead: _Ahead) -> Any:
        """Issue the copy of one leaf of a batch. Returns the copy, the leaf itself, or a `_Later`."""
        streams, slot = self._streams, self._slot
        if not isinstance(leaf, Tensor):
            if not (hasattr(leaf, "pin_memory") and hasattr(leaf, "record_stream")):
                ahead.later = True
                return _Later(leaf)
            pinned = leaf.pin_memory()
            slot.sources.append(pinned)
            self._begin(ahead)
            ahead.moved.append(pinned.to(streams.device, non_blocking=True))
            return ahead.moved[-1]
        dtype = _target(leaf, self._dtype)
        here = streams.is_here(leaf)
        if here and dtype is leaf.dtype:
            return leaf
        if here or leaf.layout is not torch.strided or not is_on_the_host(leaf):
            ahead.later = True
            return _Later(leaf, dtype)
        stride = leaf.stride() if leaf.is_contiguous() else torch.empty_like(leaf, device="meta").stride()
        sent = dtype if self._cast == "before" else leaf.dtype
        target = streams.empty(leaf.shape, stride, sent)
        if leaf.numel():
            if sent is leaf.dtype and stride == leaf.stride() and streams.is_pinned(leaf):
                source = leaf
                slot.sources.append(leaf)
            else:
                source = slot.stage(leaf, stride, sent)
            self._begin(ahead)
            streams.copy(target, source)
        if sent is not dtype:
            target = streams.cast(target, dtype)
        ahead.moved.append(target)
        return target

    def _hand_over(self, ahead: _Ahead) -> Batch:
        """Make the consumer's stream wait for a batch. Returns the batch."""
        streams = self._streams
        current = streams.current()
        if self._timer is not None:
            asked, given = (streams.event(timing=True) for _ in range(2))
            streams.record(asked, current)
            streams.wait(current, ahead.event)
            streams.record(given, current)
            self._timer.add(ahead.begun, ahead.event, asked, given)
        else:
            streams.wait(current, ahead.event)
        for moved in ahead.moved:
            streams.keep(moved, current)
        batch: Batch = ahead.batch
        if ahead.later:
            batch = map_leaves(batch, lambda leaf: leaf.to(streams.device) if isinstance(leaf, _Later) else leaf)
        return batch


def use_up(batches: Iterator[Any], count: int = 3) -> None:
    """Take `count` batches, which were copied while the device was idle, so that a timed loop starts without them."""
    for _ in range(count):
        next(batches)
