"""Explain an out-of-memory error: the network's need for a batch, the device's memory, and a batch that would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .engine import settings
from .errors import count

__all__ = ["ADAM", "Need", "Room", "add", "explain", "need", "room"]

OURS = "\nmlp_fused: "  # begins the text that is added to an error
ADAM = 2  # tensors that Adam keeps for each parameter
# A step of plain torch holds about this many tensors at once besides the saved ones: input, output and two gradients,
# each as wide as the widest layer. For the kernels, only one is counted, because their workspace is known.
WORKING = 4


@dataclass(frozen=True)
class Room:
    """Memory limit and usage of a device: the bytes that torch can allocate in this process, and those allocated."""

    limit: int
    allocated: int


def room(device: torch.device) -> Room | None:
    """Memory limit and usage of a GPU; None for other devices."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return Room(min(free + torch.cuda.memory_reserved(device), allowed), torch.cuda.memory_allocated(device))


@dataclass(frozen=True)
class Need:
    """The bytes that a step needs.

    Attributes:
        rows: the batch size.
        saved: bytes saved for backward, as `explain` counts them; 0 if no gradients are recorded.
        workspace: an estimate of the further bytes while the step computes.
        fixed: bytes that do not depend on the batch: parameters and buffers, and in training gradients and the
            optimizer's state.
        device: the device of the parameters.
        room: the memory of that device.
        state: the number of tensors that the optimizer keeps for each parameter.
    """

    rows: int
    saved: int
    workspace: int
    fixed: int
    device: torch.device
    room: Room | None
    state: int = ADAM

    @property
    def fits(self) -> int | None:
        """An estimate of the rows that would fit, a power of two or 0; None if the device's memory is not known."""
        if self.room is None or not self.rows:
            return None
        step = self.saved + self.workspace
        # Memory that is allocated and not counted here belongs to other tensors, and stays allocated.
        held = max(self.fixed, self.room.allocated - step)
        rows = max(0, self.room.limit - held) * self.rows // max(step, 1)
        return 1 << rows.bit_length() - 1 if rows else 0

    def __str__(self) -> str:
        saved = f"{gib(self.saved)} of saved activations and " if self.saved else ""
        fixed = "parameters"
        if self.saved:
            fixed += f", gradients and optimizer state ({count(self.state, 'tensor')} per parameter)"
        lines = [
            f"a batch of {count(self.rows, 'row', ',')} needs {saved}about {gib(self.workspace)} of workspace, plus "
            f"{gib(self.fixed)} for {fixed}."
        ]
        if self.room is not None:
            limit, allocated = gib(self.room.limit), gib(self.room.allocated)
            lines.append(f"{self.device} has {limit} for this process, of which {allocated} are in use.")
        if self.fits == 0:
            lines.append("Not even one row would fit.")
        elif self.fits is not None and self.fits < self.rows:
            lines.append(f"A batch of about {count(self.fits, 'row', ',')} should fit.")
        elif self.fits is not None:
            lines.append("By this estimate the batch fits, so the free memory is probably fragmented.")
        return " ".join(lines)


def gib(nbytes: int) -> str:
    """Bytes in GiB or MiB, for messages."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"


def need(model: Any, rows: int, state: int = ADAM) -> Need:
    """The memory that a step of a network needs, with gradients and autocast on or off as they are now.

    Raises:
        ValueError: as `model.explain` does.
    """
    parameters = list(model.parameters())
    trainable = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    training = torch.is_grad_enabled() and trainable > 0
    plan = model.explain(rows)
    widest = max(width for parameter in parameters if parameter.dim() == 2 for width in parameter.shape)
    fixed = sum(tensor.nbytes for tensor in (*parameters, *model.buffers()))
    device = parameters[0].device
    return Need(
        rows,
        plan.saved_bytes if training else 0,
        (1 if plan.workspace_bytes else WORKING) * rows * widest * plan.dtype.itemsize + plan.workspace_bytes,
        fixed + (1 + state) * trainable * training,
        device,
        room(device),
        state,
    )


def add(error: BaseException, text: str) -> None:
    """Add a line to an exception's message. Its class and traceback stay.

    (`add_note` needs Python 3.11, and its text is not in str(error), which programs log.)
    """
    error.args = (f"{error}\n{text}",)


def explain(error: torch.OutOfMemoryError, model: Any, rows: int, state: int = ADAM, hints: Sequence[str] = ()) -> None:
    """Add to the error the memory that the network needs for `rows`, a batch that would fit, and ways to use less.

    For a network within a network, the text of the outer one replaces that of the inner one. If `model.explain` fails,
    the error does not change.
    """
    try:
        needed = need(model, rows, state)
        # Autocast would help a network that computes in float32. It does not change float64.
        wide = settings.compute_dtype(next(model.parameters()).dtype, needed.device.type) == torch.float32
    except Exception:  # a network may have modules of any kind; an explanation must not hide the error
        return
    error.args = (str(error).partition(OURS)[0],)
    *others, last = hints or _hints(model, needed.saved > 0, wide)
    add(error, f"{OURS.strip()} {needed} To use less memory: {', '.join([*others, 'or ' * bool(others) + last])}.")


def _hints(model: Any, training: bool, wide: bool) -> list[str]:
    """Ways to use less memory, for users of the Python interface."""
    hints = ["a smaller batch"]
    if training and not model.recompute:
        hints.append("recompute=True")
    if wide:
        hints.append("torch.autocast")
    if training:
        hints.append("torch.inference_mode() for inference")
    return hints
