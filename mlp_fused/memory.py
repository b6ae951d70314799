"""Out of memory: what a network needs for a batch, what its device has, and which batch would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .engine import settings
from .errors import count

__all__ = ["ADAM", "Need", "Room", "add", "explain", "need", "room"]

OURS = "\nmlp_fused: "  # before what is added to an error
ADAM = 2  # tensors that the optimizer keeps of each parameter
# Tensors as wide as the widest layer that a step of plain torch holds at once besides what is kept: input, output, and
# two gradients. The kernels' workspace, which is known, stands for all but one of them.
WORKING = 4


@dataclass(frozen=True)
class Room:
    """Bytes of a device: what torch's allocator can have in this process at the most, and what its tensors take."""

    limit: int
    allocated: int


def room(device: torch.device) -> Room | None:
    """The memory of a GPU; None for other devices."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return Room(min(free + torch.cuda.memory_reserved(device), allowed), torch.cuda.memory_allocated(device))


@dataclass(frozen=True)
class Need:
    """Bytes of a step.

    Attributes:
        rows: of the batch.
        kept: for backward, as `explain` counts it; 0 where no gradients are recorded.
        working: besides, while it computes; about.
        fixed: whatever the batch: parameters and buffers, and in training gradients and the optimizer's state.
        device: the parameters'.
        room: what that has.
        state: tensors that the optimizer keeps of each parameter.
    """

    rows: int
    kept: int
    working: int
    fixed: int
    device: torch.device
    room: Room | None
    state: int = ADAM

    @property
    def fits(self) -> int | None:
        """About how many rows would fit, a power of two or 0; None where the device's memory is not known."""
        if self.room is None or not self.rows:
            return None
        step = self.kept + self.working
        # What is allocated and not accounted for here is somebody else's, and stays.
        held = max(self.fixed, self.room.allocated - step)
        rows = max(0, self.room.limit - held) * self.rows // max(step, 1)
        return 1 << rows.bit_length() - 1 if rows else 0

    def __str__(self) -> str:
        kept = gib(self.kept) if self.kept else "nothing"
        beside = "parameters"
        if self.kept:
            beside += f", gradients and an optimizer's state ({count(self.state, 'tensor')} a parameter)"
        lines = [
            f"for {count(self.rows, 'row')} the network keeps {kept} for backward and works with about "
            f"{gib(self.working)} more, beside {gib(self.fixed)} of {beside}."
        ]
        if self.room is not None:
            limit, allocated = gib(self.room.limit), gib(self.room.allocated)
            lines.append(f"This process can have {limit} of {self.device}; its tensors take {allocated}.")
        if self.fits == 0:
            lines.append("Not even one row would fit.")
        elif self.fits is not None and self.fits < self.rows:
            lines.append(f"About {count(self.fits, 'row')} would fit.")
        elif self.fits is not None:
            lines.append("By this count the batch fits: what is free may be in pieces.")
        return " ".join(lines)


def gib(nbytes: int) -> str:
    """Bytes as people read them."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"


def need(model: Any, rows: int, state: int = ADAM) -> Need:
    """The memory that a step of a network takes, under the mode of gradients and the autocast that are on.

    Raises:
        ValueError: as `model.explain` does.
    """
    parameters = list(model.parameters())
    trainable = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    training = torch.is_grad_enabled() and trainable > 0
    found = model.explain(rows)
    widest = max(width for parameter in parameters if parameter.dim() == 2 for width in parameter.shape)
    fixed = sum(tensor.nbytes for tensor in (*parameters, *model.buffers()))
    device = parameters[0].device
    return Need(
        rows,
        found.kept_bytes if training else 0,
        (1 if found.workspace_bytes else WORKING) * rows * widest * found.dtype.itemsize + found.workspace_bytes,
        fixed + (1 + state) * trainable * training,
        device,
        room(device),
        state,
    )


def add(error: BaseException, text: str) -> None:
    """The same exception, of the same class and traceback, with a line after its own.

    (`add_note` is of Python 3.11, and no part of str(error), which is what gets logged.)
    """
    error.args = (f"{error}\n{text}",)


def explain(error: torch.OutOfMemoryError, model: Any, rows: int, state: int = ADAM, mends: Sequence[str] = ()) -> None:
    """Add to the error what the network needs for so many rows, which batch would fit, and what takes less.

    A network within another one has been told of already, and is taken for a part of it. One that `model.explain` does
    not know leaves the error as it was.
    """
    try:
        found = need(model, rows, state)
        # Autocast computes in 16 bits what is float32, and leaves float64 as it is.
        wide = settings.compute_dtype(next(model.parameters()).dtype, found.device.type) == torch.float32
    except Exception:  # anybody's modules may stand in a network; what explains an error must not hide it
        return
    error.args = (str(error).partition(OURS)[0],)
    add(error, f"{OURS.strip()} {found} Less is taken by {', '.join(mends or _mends(model, found.kept > 0, wide))}.")


def _mends(model: Any, keeps: bool, wide: bool) -> list[str]:
    """Ways to take less memory, in Python."""
    mends = ["fewer rows at once"]
    if keeps and not model.recompute:
        mends.append("recompute=True")
    if wide:
        mends.append("16 bits (torch.autocast)")
    if keeps:
        mends.append("torch.inference_mode() where no backward follows")
    return mends
