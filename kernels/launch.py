"""How every kernel is launched: on the device that its tensors are on, counted, with offsets wide enough.

Through Triton's own launcher a launch of twenty arguments costs its binding, hashing and checking anew each time. A
`Launch` is made for given shapes, strides and dtypes, goes that way once, and from then on straight to the compiled
kernel, with nothing but pointers to fill in.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .language import ROWS_OF_16_ELEMENTS, allocation, driver, tl, triton
from .tile_config import TileConfig

__all__ = [
    "Launch", "Program", "by_columns", "cdiv", "count_launches", "describable", "has_descriptor_strides", "launch",
    "launched_by", "offset_type",
]  # fmt: skip

_hooks = triton.knobs.runtime

Tensors = Sequence["Tensor | tuple[Tensor | None, ...] | None"]

Slots = Sequence["int | tuple[int, ...]"]

_counters: list[dict[str, int]] = []

Launcher = Callable[["Launch", Tensors], None]

_launchers: list[Launcher] = []

# Held while Triton launches, which compiles and loads a kernel the first time: two threads would race in its loading.
# Replayed launches do not take it. Reentrant, as hooks that Triton calls may launch kernels themselves.
_through_triton = threading.RLock()


class Launch:
    """`programs` instances of a kernel for tensors of certain shapes, strides and dtypes, by a tile.

    A kernel's parameters are its tensors, its integers (`scalars`), and its constants, in that order.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        device: torch.device,
        tile: TileConfig,
        scalars: tuple[Any, ...],
        constants: dict[str, Any],
    ) -> None:
        self.kernel = kernel
        self.programs = programs
        self.device = device
        self.index = device.index
        self.scalars = scalars
        self.constants = {**constants, **tile.constants}
        # Of the compiled kernel, once there is one.
        self.run: Any = None
        self.binary: tuple[Any, ...] = ()
        self.rest: tuple[Any, ...] = ()  # what follows the pointers: integers, and all constants
        self.needs_scratch = False

    def __call__(self, *tensors: Any) -> bool:
        """Launch it; or do nothing and return False, where a tensor is not aligned to 16 bytes, as it is compiled for.

        The shapes, strides and dtypes of `tensors` are not looked at: they are those that it was made for.
        """
        pointers: list[Any] = []
        bits = 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
            elif type(tensor) is tuple:
                nested = tuple([None if each is None else each.data_ptr() for each in tensor])
                for pointer in nested:
                    bits |= pointer or 0
                pointers.append(nested)
            else:
                pointer = tensor.data_ptr()
                bits |= pointer
                pointers.append(pointer)
        if bits & 15:
            return False
        if self.run is None or Program.is_hooked():
            self.through_triton(tensors)  # which tells hooks, a profiler's for example, of the launch
            return True
        if _counters:
            self._count()
        if self._is_here():
            self._run(pointers)
        else:
            with torch.cuda.device(self.index):
                self._run(pointers)
        return True

    def _run(self, pointers: list[Any]) -> None:
        stream = 0 if self.index is None else driver.active.get_current_stream(self.index)
        if not self.needs_scratch:
            self.run(self.programs, 1, 1, stream, *self.binary, None, None, None, *pointers, *self.rest)
            return
        token = allocation._allocator.set(self._allocate)
        try:
            self.run(self.programs, 1, 1, stream, *self.binary, None, None, None, *pointers, *self.rest)
        finally:
            allocation._allocator.reset(token)

    def through_triton(self, tensors: Tensors) -> None:
        """Launch it by Triton's launcher, which compiles it for these tensors' alignment if need be; one at a time."""
        if self.programs == 0:
            return
        if _launchers:
            _launchers[-1](self, tensors)
            return
        self._count()
        token = allocation._allocator.set(self._allocate)
        try:
            with _through_triton, contextlib.nullcontext() if self._is_here() else torch.cuda.device(self.index):
                compiled = self.kernel[(self.programs,)](*tensors, *self.scalars, **self.constants)
        finally:
            allocation._allocator.reset(token)
        if compiled is not None and _aligned(tensors):
            self.keep(compiled, len(tensors))

    def keep(self, compiled: Any, tensors: int) -> None:
        """Go straight to the compiled kernel from now on, of whose parameters so many are tensors."""
        constants = self.kernel.params[tensors + len(self.scalars) :]
        self.rest = (*self.scalars, *(self.constants.get(each.name, each.default) for each in constants))
        self.needs_scratch = getattr(compiled.metadata, "global_scratch_size", 0) > 0  # AMD's has no such thing
        self.binary = (compiled.function, compiled.packed_metadata)
        self.run = compiled.run

    def _is_here(self) -> bool:
        """Whether the current device, on which Triton launches, is the tensors'."""
        return self.index is None or self.index == torch.cuda.current_device()

    def _allocate(self, size: int, alignment: int, stream: int | None) -> Tensor:
        """Memory for the tensor descriptors that a kernel makes, from torch's own pool."""
        return torch.empty(size, dtype=torch.int8, device=self.device)

    def _count(self) -> None:
        for counter in _counters:
            counter[self.kernel.__name__] = counter.get(self.kernel.__name__, 0) + 1


class Program:
    """Launches one after the other on one device, which share a list of pointers: each is told which are its own.

    What a launch alone looks after anew (the device, its stream), many look after once. A launch's slots are positions
    in the list of pointers, one for each of its tensors, a tuple for a tuple. Every launch has run before.
    """

    def __init__(self, steps: Sequence[tuple[Launch, Slots]]) -> None:
        self.launches = [launch for launch, _ in steps]
        self.index = self.launches[0].index
        self.needs_scratch = any(launch.needs_scratch for launch in self.launches)
        self.steps = [
            (launch.run, launch.programs, launch.binary, _taker(slots), launch.rest) for launch, slots in steps
        ]

    @staticmethod
    def is_hooked() -> bool:
        """True if a hook has to be told of each launch, as Triton's own launcher does."""
        return _has_calls(_hooks.launch_enter_hook) or _has_calls(_hooks.launch_exit_hook)

    def __call__(self, pointers: Sequence[int | None]) -> None:
        """Launch them all, on memory aligned to 16 bytes."""
        if _counters:
            for launch in self.launches:
                launch._count()
        if self.index is None or self.index == torch.cuda.current_device():
            self._run(pointers)
        else:
            with torch.cuda.device(self.index):
                self._run(pointers)

    def _run(self, pointers: Sequence[int | None]) -> None:
        stream = 0 if self.index is None else driver.active.get_current_stream(self.index)
        token = allocation._allocator.set(self.launches[0]._allocate) if self.needs_scratch else None
        try:
            for run, programs, binary, take, rest in self.steps:
                run(programs, 1, 1, stream, *binary, None, None, None, *take(pointers), *rest)
        finally:
            if token is not None:
                allocation._allocator.reset(token)


def _taker(slots: Slots) -> Callable[[Sequence[int | None]], tuple[Any, ...]]:
    """From all pointers, a launch's."""
    if any(isinstance(slot, tuple) for slot in slots):
        takers = [operator.itemgetter(slot) if isinstance(slot, int) else _taker(slot) for slot in slots]
        return lambda pointers: tuple([take(pointers) for take in takers])
    take = operator.itemgetter(*slots)
    return take if len(slots) > 1 else lambda pointers: (take(pointers),)


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    tile: TileConfig,
    tensors: Tensors,
    scalars: tuple[Any, ...],
    **constants: Any,
) -> Launch | None:
    """Launch a kernel, or nothing where there is no program.

    Returns:
        The `Launch`, for doing so again; None where a tensor is not aligned to 16 bytes, as later ones may well be.
    """
    made = Launch(kernel, programs, device, tile, scalars, constants)
    made.through_triton(tensors)
    return made if _aligned(tensors) else None


def _has_calls(hook: Any) -> bool:
    """Whether somebody wants to be told of each launch."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _aligned(tensors: Tensors) -> bool:
    flat = (each for tensor in tensors for each in (tensor if isinstance(tensor, tuple) else (tensor,)))
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in flat)


@contextlib.contextmanager
def count_launches() -> Iterator[dict[str, int]]:
    """Within the block, count kernel launches: a dict from the kernel's name to their number."""
    counter: dict[str, int] = {}
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


@contextlib.contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """Within the block, `launcher(launch, tensors)` takes the place of Triton's launcher, to compile ahead for example.

    It is for all threads.
    """
    _launchers.append(launcher)
    try:
        yield
    finally:
        _launchers.remove(launcher)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own takes 5 µs.)"""
    return -(-a // b)


def offset_type(*tensors: Tensor | None) -> Any:
    """The integer type for offsets: 64 bits where any tensor's last element lies at 2^31 or beyond."""
    for tensor in tensors:
        if tensor is not None and sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) >= 2**31:
            return tl.int64
    return tl.int32


def by_columns(tensor: Tensor) -> bool:
    """Whether a tensor (rows, columns) is contiguous along its columns, rather than along its rows."""
    return tensor.stride(1) == 1


MOST_STRIDE = 2**40  # bytes from a row to the next, exclusively: cuTensorMapEncodeTiled's globalStrides


def describable(*tensors: Tensor | None) -> bool:
    """Whether tensor descriptors can describe these: 16-byte aligned, contiguous one way, whole 16 bytes the other."""
    return all(
        tensor is None or (has_descriptor_strides(tensor.stride(), tensor.itemsize) and tensor.data_ptr() % 16 == 0)
        for tensor in tensors
    )


def has_descriptor_strides(stride: Sequence[int], itemsize: int) -> bool:
    """True if tensor descriptors can describe a tensor (rows, columns) of these strides, wherever it begins."""
    far, near = stride if stride[1] == 1 else stride[::-1]
    nbytes = far * itemsize
    whole = nbytes % 16 == 0 and not (ROWS_OF_16_ELEMENTS and far % 16)
    return near == 1 and 0 < nbytes < MOST_STRIDE and whole
