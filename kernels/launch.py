"""Launch kernels, on the device of their tensors; count launches; choose the integer type for offsets.

Triton's own launcher binds, hashes and checks all arguments, about twenty, on every launch. A `Launch` belongs to fixed
shapes, strides and dtypes. Its first launch goes through Triton's launcher, and it then caches the compiled kernel.
After that, a schedule calls the compiled kernel directly, and only fills in pointers (`LaunchSequence` of the engine).
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

counters: list[dict[str, int]] = []  # the dicts that active `count_launches` blocks count into

Launcher = Callable[["Launch", Tensors], None]

_launchers: list[Launcher] = []

# Held while Triton's launcher runs: it compiles and loads a kernel at the first launch, and two threads would race
# there. Replayed launches do not take it. Reentrant, because hooks that Triton calls may launch kernels themselves.
_through_triton = threading.RLock()


class Launch:
    """A launch of `programs` instances of a kernel, with a tile, for tensors of fixed shapes, strides and dtypes.

    The parameters of a kernel are its tensors, its numbers (`scalars`), and its constants, in that order.
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
        # Set once the kernel is compiled.
        self.run: Any = None
        self.binary: tuple[Any, ...] = ()
        self.rest: tuple[Any, ...] = ()  # the arguments after the pointers: scalars, and all constants
        self.needs_scratch = False

    def through_triton(self, tensors: Tensors) -> None:
        """Launch through Triton's launcher, one thread at a time. It compiles the kernel if it has to."""
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
            self.cache_compiled(compiled, len(tensors))

    def cache_compiled(self, compiled: Any, tensor_count: int) -> None:
        """Cache the compiled kernel and its arguments, except the first `tensor_count` ones, the tensors."""
        constants = self.kernel.params[tensor_count + len(self.scalars) :]
        self.rest = (*self.scalars, *(self.constants.get(constant.name, constant.default) for constant in constants))
        self.needs_scratch = getattr(compiled.metadata, "global_scratch_size", 0) > 0  # missing on AMD
        self.binary = (compiled.function, compiled.packed_metadata)
        self.run = compiled.run

    def allocate(self, size: int, alignment: int, stream: int | None) -> Tensor:
        """Memory for the tensor descriptors that a kernel creates, from torch's caching allocator."""
        return torch.empty(size, dtype=torch.int8, device=self.device)

    def count(self) -> None:
        """Count this launch in every active `count_launches` block."""
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
    """Launch a kernel; do nothing if `programs` is 0.

    Returns:
        The `Launch`, for a replay. None if a tensor is not 16-byte aligned: the kernel was then compiled for unaligned
        tensors, and later ones may be aligned.
    """
    new = Launch(kernel, programs, device, tile, scalars, constants)
    new.through_triton(tensors)
    return new if _aligned(tensors) else None


def is_hooked() -> bool:
    """True if Triton has a launch hook, a profiler's for example, that must be called on every launch."""
    for hook in (_hooks.launch_enter_hook, _hooks.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # a chain of hooks may be empty
            return True
    return False


def _aligned(tensors: Tensors) -> bool:
    groups = (entry if isinstance(entry, tuple) else (entry,) for entry in tensors)
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for group in groups for tensor in group)


@contextlib.contextmanager
def count_launches() -> Iterator[dict[str, int]]:
    """Within the block, count kernel launches. The dict maps a kernel's name to its number of launches."""
    counter: dict[str, int] = {}
    counters.append(counter)
    try:
        yield counter
    finally:
        counters.remove(counter)


@contextlib.contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """Within the block, call `launcher(launch, tensors)` instead of Triton's launcher, to compile ahead for example.

    This applies to all threads.
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
    """The integer type for offsets: 64 bits if the last element of any tensor has an offset of 2^31 or more."""
    for tensor in tensors:
        if tensor is not None and sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride())) >= 2**31:
            return tl.int64
    return tl.int32


def by_columns(tensor: Tensor) -> bool:
    """True if neighbouring columns of a (rows, columns) tensor are adjacent in memory."""
    return tensor.stride(1) == 1


MOST_STRIDE = 2**40  # a stride must be smaller than this many bytes: globalStrides of cuTensorMapEncodeTiled


def describable(*tensors: Tensor | None) -> bool:
    """True if tensor descriptors can describe these tensors.

    A tensor must be 16-byte aligned. One of its strides must be 1, the other a multiple of 16 bytes.
    """
    return all(
        tensor is None or (has_descriptor_strides(tensor.stride(), tensor.itemsize) and tensor.data_ptr() % 16 == 0)
        for tensor in tensors
    )


def has_descriptor_strides(stride: Sequence[int], itemsize: int) -> bool:
    """True if tensor descriptors can describe a (rows, columns) tensor with these strides, apart from its alignment."""
    far, near = stride if stride[1] == 1 else stride[::-1]
    nbytes = far * itemsize
    whole = nbytes % 16 == 0 and not (ROWS_OF_16_ELEMENTS and far % 16)
    return near == 1 and 0 < nbytes < MOST_STRIDE and whole
