"""The device and the dtype of a command."""

from __future__ import annotations

from typing import Literal

import torch

from .errors import UserError, first_line

__all__ = [
    "ARITHMETIC",
    "DTYPES",
    "ArithmeticName",
    "DtypeName",
    "autocast",
    "check_dtype",
    "dtype_name",
    "pick_device",
]

DtypeName = Literal["fp32", "bf16", "fp16"]
ArithmeticName = Literal["fp32", "tf32", "bf16", "fp16"]  # the dtypes, with both ways to multiply float32

# A dtype, and how float32 is multiplied ("ieee" for all others).
ARITHMETIC: dict[str, tuple[torch.dtype, str]] = {
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
}
DTYPES = {name: dtype for name, (dtype, precision) in ARITHMETIC.items() if precision == "ieee"}


def dtype_name(dtype: torch.dtype) -> str:
    """Torch's name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def pick_device(name: str, local: int | None = None) -> torch.device:
    """The torch device with this name; for "auto" a CUDA GPU if there is one, else the CPU.

    `local` is the local rank of this process, if there are several processes. Each process has its own GPU.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if local is None or name == "cpu":
            return torch.device(name)
    if local is not None and name.startswith("cuda"):
        gpus = torch.cuda.device_count()
        if name != "cuda":
            raise UserError(f"--device {name} is one GPU for several processes; --device cuda gives each its own")
        if local >= gpus > 0:
            raise UserError(
                f"torchrun's --nproc-per-node starts more processes than this machine has GPUs, {gpus}; each needs one "
                "of its own (or --device cpu)"
            )
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # AssertionError, RuntimeError, ImportError: it depends on the kind of device
        why = first_line(error).partition(". ")[0]  # what follows lists all devices that torch knows
        raise UserError(f"--device {name} cannot be used here: {why}; --device cpu always works") from None
    return device


def check_dtype(name: DtypeName, device: torch.device) -> None:
    """Check that the device can train in this dtype.

    Raises:
        UserError: the device cannot.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("--dtype fp16 needs a GPU; on a CPU, use fp32 or bf16")
    if name == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UserError(f"{torch.cuda.get_device_name()} does not support --dtype bf16; use fp32 or fp16")


def autocast(name: DtypeName, device: torch.device) -> torch.autocast:
    """An autocast context for this dtype; disabled for fp32."""
    return torch.autocast(device.type, dtype=DTYPES[name], enabled=name != "fp32")
