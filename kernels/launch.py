"""Launches of kernels: on the device of their tensors, counted, with offsets that are wide enough.

Through Triton's own launcher a launch of twenty arguments costs its binding, hashing and checking anew each time. A
`Launch` is made for given shapes, strides and dtypes, goes that way once, and then knows the compiled kernel: a
schedule goes straight to it from then on, with nothing but pointers to fill in (engine/schedule.py, `Program`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .language import ROWS_OF_16_ELEMENTS, allocation, tl, triton
from .tile_config import TileConfig

__all__ = [
    "Launch", "by_columns", "cdiv", "count_launches", "counters", "describable", "has_descriptor_strides", "is_hooked",
    "launch", "launched_by", "offset_type",
]  # fmt: skip

_hooks = triton.knobs.runtime

Tensors = Sequence["Tensor | tuple[Tensor | None, ...] | None"]

counters: list[dict[str, int]] = []  # what `count_launches` counts into

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

    def through_triton(self, tensors: Tensors) -> None:
        """Launch it by Triton's launcher, which compiles it for these tensors' alignment if need be; one at a time."""
        if self.programs == 0:
            return
        if _launchers:
            _launchers[-1](self, tensors)
            return
        self.count()
        is_here = self.index is None or self.index == torch.cuda.current_device()
        token = allocation._allocator.set(self.allocate)
        try:
            with _through_triton, contextlib.nullcontext() if is_here else torch.cuda.device(self.index):
                compiled = self.kernel[(self.programs,)](*tensors, *self.scalars, **self.constants)
        finally:
            allocation._allocator.reset(token)
        if compiled is not None and _aligned(tensors):
            self.keep(compiled, len(tensors))

    def keep(self, compiled: Any, tensors: int) -> None:
        """Remember the compiled kernel, of whose parameters so many are tensors, and all its arguments but those."""
        constants = self.kernel.params[tensors + len(self.scalars) :]
        self.rest = (*self.scalars, *(self.constants.get(each.name, each.default) for each in constants))
        self.needs_scratch = getattr(compiled.metadata, "global_scratch_size", 0) > 0  # AMD's has no such thing
        self.binary = (compiled.function, compiled.packed_metadata)
        self.run = compiled.run

    def allocate(self, size: int, alignment: int, stream: int | None) -> Tensor:
        """Memory for the tensor descriptors that a kernel makes, from torch's own pool."""
        return torch.empty(size, dtype=torch.int8, device=self.device)

    def count(self) -> None:
        """Count it, where somebody counts."""
        for counter in counters:
            counter[self.kernel.__name__] = counter.get(self.kernel.__name__, 0) + 1


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
        The `Launch`, for a replay; None where a tensor is not aligned to 16 bytes, as later ones may well be.
    """
    made = Launch(kernel, programs, device, tile, scalars, constants)
    made.through_triton(tensors)
    return made if _aligned(tensors) else None


def is_hooked() -> bool:
    """True if a hook, a profiler's for example, has to be told of each launch, as Triton's own launcher does."""
    return _has_calls(_hooks.launch_enter_hook) or _has_calls(_hooks.launch_exit_hook)


def _has_calls(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def _aligned(tensors: Tensors) -> bool:
    flat = (each for tensor in tensors for each in (tensor if isinstance(tensor, tuple) else (tensor,)))
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in flat)


@contextlib.contextmanager
def count_launches() -> Iterator[dict[str, int]]:
    """Within the block, count kernel launches: a dict from the kernel's name to their number."""
    counter: dict[str, int] = {}
    counters.append(counter)
    try:
        yield counter
    finally:
        counters.remove(counter)


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
    """True if a tensor (rows, columns) is contiguous along its columns, rather than along its rows."""
    return tensor.stride(1) == 1


MOST_STRIDE = 2**40  # bytes from a row to the next, exclusively: cuTensorMapEncodeTiled's globalStrides


def describable(*tensors: Tensor | None) -> bool:
    """True if tensor descriptors can describe these: 16-byte aligned, contiguous one way, whole 16 bytes the other."""
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
