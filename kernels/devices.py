"""GPUs: the properties on which the choice of a tile and the shortest possible time (the floor) depend."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .language import INTERPRETER

__all__ = ["DEVICES", "Device", "device_record", "device_slug", "named_device"]


@dataclass(frozen=True)
class Device:
    """A GPU: the properties on which the choice of a tile and the shortest possible time (the floor) depend."""

    name: str
    backend: str  # "cuda" or "hip"
    arch: int | str  # in the form of triton's GPUTarget: 90, "gfx942"
    multiprocessors: int
    shared_memory: int  # the most bytes that one program can use
    warp_size: int = 32
    bandwidth: float | None = None  # bytes a second, from the data sheet; None where unknown
    tensor_16: float | None = None  # FLOP a second, dense, 16-bit operands
    tensor_tf32: float | None = None
    fma_32: float | None = None

    def peak(self, dtype: torch.dtype, precision: str = "ieee") -> float | None:
        """FLOP a second, from the data sheet, for products of this dtype and precision (see tile.py)."""
        if precision in PRODUCTS_OF_PARTS:
            return self.tensor_16 / PRODUCTS_OF_PARTS[precision] if self.tensor_16 else None
        if dtype == torch.float32:
            return self.tensor_tf32 if precision == "tf32" else self.fma_32
        return self.tensor_16 if dtype in (torch.float16, torch.bfloat16) else None


# The number of 16-bit products that compute one fp32 product, by its precision.
PRODUCTS_OF_PARTS = {"bf16x6": 6, "fp16x3": 3, "fp16x1": 1}

# Data sheets: NVIDIA's for A100 SXM, H100 SXM, H200 SXM and B200, AMD's for MI300X; dense rates, without sparsity.
DEVICES = {
    device.name: device
    for device in (
        Device("NVIDIA A100", "cuda", 80, 108, 166912, 32, 2.039e12, 312e12, 156e12, 19.5e12),
        Device("NVIDIA H100", "cuda", 90, 132, 232448, 32, 3.35e12, 989e12, 494e12, 67e12),
        Device("NVIDIA H200", "cuda", 90, 132, 232448, 32, 4.8e12, 989e12, 494e12, 67e12),
        Device("NVIDIA B200", "cuda", 100, 148, 232448, 32, 8e12, 2250e12, 1100e12, 75e12),
        Device("AMD MI300X", "hip", "gfx942", 304, 65536, 64, 5.3e12, 1307e12, 654e12, 163e12),
    )
}
# The interpreter uses the tiles of a small Hopper GPU, so that tests exercise the same rules.
INTERPRETED_DEVICE = Device("Triton's interpreter", "cuda", 90, 4, 232448)
BLACKWELL = (100, 103)
DESCRIPTOR_ARCHITECTURES = (90, 100, 103)


# Words of a GPU's full name that `named_device` ignores: the product line, the module, the memory.
IMPLIED = re.compile(r"instinct|tesla|oam|sxm\d*|hbm\w*|80gb|141gb|180gb|192gb")


def named_device(name: str) -> Device | None:
    """The device in `DEVICES` with such a name: "NVIDIA H100", "h100" or "A100-SXM4-80GB"; None if there is none.

    Raises:
        ValueError: several devices fit the name.
    """
    words = {word for word in _words(name) if not IMPLIED.fullmatch(word)}
    fitting = [device for known, device in DEVICES.items() if words and words <= _words(known)]
    if len(fitting) > 1:
        raise ValueError(f"device is {name!r}; it needs to be one of: {', '.join(device.name for device in fitting)}")
    return fitting[0] if fitting else None


def known_device(name: str) -> Device:
    """The device in `DEVICES` whose words are all in a GPU's full name, such as "AMD Instinct MI300X".

    If there is none, `INTERPRETED_DEVICE`, which has no rates.
    """
    words = _words(name)
    return next((device for known, device in DEVICES.items() if _words(known) <= words), INTERPRETED_DEVICE)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def device_slug(name: str) -> str:
    """The file name of a device's results and tiles: its name in lower case, other characters as "_".

    "NVIDIA H200" is nvidia_h200; "NVIDIA A100-SXM4-80GB" is nvidia_a100_sxm4_80gb.
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def device_record(tensor: Tensor) -> Device:
    """The `Device` of a tensor; `INTERPRETED_DEVICE` for a CPU tensor."""
    return describe(tensor.device.type, tensor.device.index or 0)


_pretended: list[Device] = []


@contextlib.contextmanager
def pretended(device: Device) -> Iterator[None]:
    """Within the block, describe every torch device as this device, to choose tiles for a GPU that is not there."""
    _pretended.append(device)
    try:
        yield
    finally:
        _pretended.remove(device)


def describe(kind: str, index: int = 0) -> Device:
    """The `Device` of a torch device, by its kind and index."""
    return _pretended[-1] if _pretended else _describe(kind, index)


@functools.lru_cache(maxsize=64)
def _describe(kind: str, index: int) -> Device:
    if kind == "cpu" or INTERPRETER:
        return INTERPRETED_DEVICE
    properties: Any = torch.cuda.get_device_properties(index)
    known = known_device(properties.name)
    hip = torch.version.hip is not None
    return Device(
        properties.name,
        "hip" if hip else "cuda",
        properties.gcnArchName.split(":")[0] if hip else properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        65536 if hip else properties.shared_memory_per_block_optin,
        64 if hip else 32,
        known.bandwidth,
        known.tensor_16,
        known.tensor_tf32,
        known.fma_32,
    )
