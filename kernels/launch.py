"""How every kernel is launched: on the device that its tensors are on, counted, with offsets wide enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .configs import TileConfig
from .language import tl

__all__ = ["by_columns", "cdiv", "count_launches", "describable", "launch", "offset_type"]

_counters: list[dict[str, int]] = []


def launch(
    kernel: Any, programs: int, device: torch.device, tile: TileConfig, *arguments: Any, **constants: Any
) -> None:
    """Launch `programs` instances of a kernel with a tile's sizes, warps and stages; none where there is no work."""
    if programs == 0:
        return
    for counter in _counters:
        counter[kernel.__name__] = counter.get(kernel.__name__, 0) + 1
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[(programs,)](*arguments, **constants, **tile.constants)
    else:
        kernel[(programs,)](*arguments, **constants, **tile.constants)


@contextlib.contextmanager
def count_launches() -> Iterator[dict[str, int]]:
    """Within the block, count kernel launches: a dict from the kernel's name to their number."""
    counter: dict[str, int] = {}
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


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


def describable(*tensors: Tensor | None) -> bool:
    """Whether tensor descriptors can describe these: 16-byte aligned, contiguous one way, whole 16 bytes the other."""
    for tensor in tensors:
        if tensor is None:
            continue
        far, near = tensor.stride() if by_columns(tensor) else tensor.stride()[::-1]
        if near != 1 or far <= 0 or far * tensor.itemsize % 16 or tensor.data_ptr() % 16:
            return False
    return True
