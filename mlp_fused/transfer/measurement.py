"""The time that a network's work takes and that moving its data takes, and when the GPU is worth it.

A GPU operation's time has parts: on its first call creating the context, allocating, compiling; then on every call the
copy of its input, launching, and the kernels. `measure` takes them apart, for a network and batch of your own, and sets
the CPU's time beside them. `mlp-fused transfer` is `run(Config(...))` with a command line before it.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import timing
from ..dtypes import dtype_name
from ..environment import distorted
from ..errors import count, first_line, whole_number
from ..prefetch import DevicePrefetcher, use_up
from ..timing import Link, Timed
from .findings import OnCpu, OnGpu, Point, Transfer
from .first_touch import FirstTouch, in_fresh_processes

__all__ = ["Gpu", "copy_calls", "measure"]

LADDER = (1 / 16, 1 / 4, 1, 4, 16)  # of the batch's rows: what is measured where `sizes` does not say
LOOPS = ("resident", "step", "prefetched", "non_waiting", "narrowed")


def copy_calls(host: Sequence[Tensor], device: torch.device) -> dict[str, Timed]:
    """The copies of pageable tensors to the device, into memory that is there: pageable, pinned, non_blocking."""
    pinned = [tensor.pin_memory() for tensor in host]
    there = [torch.empty_like(tensor, device=device) for tensor in host]

    def copies(sources: Sequence[Tensor], non_blocking: bool) -> Callable[[int], None]:
        def call(_: int) -> None:
            for target, source in zip(there, sources):
                target.copy_(source, non_blocking=non_blocking)

        return call

    return {
        "pageable": Timed(copies(host, False), waits=True),
        "pinned": Timed(copies(pinned, False), waits=True),
        "non_blocking": Timed(copies(pinned, True)),
    }


class Work:
    """A network and its batches on a device: forward, backward, a step. The network is a copy."""

    def __init__(self, model: nn.Module, training: bool, device: torch.device | str) -> None:
        self.model = copy.deepcopy(model).to(device).train(training)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad] if training else []

    def forward(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """The output's tensors; those that have gradients, in training."""
        with torch.set_grad_enabled(bool(self.parameters)):
            outputs = [leaf for leaf in tree_leaves(self.model(*batch)) if isinstance(leaf, Tensor)]
        return [each for each in outputs if each.requires_grad] if self.parameters else outputs

    def gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Random ones of the outputs, in training."""
        return [torch.randn_like(each) for each in outputs] if self.parameters else []

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        torch.autograd.grad(outputs, self.parameters, gradients, allow_unused=True)

    def calls(self, batches: Sequence[Sequence[Tensor]]) -> dict[str, Timed]:
        """Forward, backward where there is one, and `resident`, on batches that are on the device, taken in turn."""
        gradients = self.gradients(self.forward(batches[0]))
        waiting: list[Sequence[Tensor]] = []

        def setup(i: int) -> None:
            waiting[:] = [self.forward(batches[i])]

        def step(i: int) -> None:
            self.step(batches[i], gradients)

        calls = {"forward": Timed(lambda i: self.forward(batches[i]), sets=len(batches))}
        if self.parameters:
            calls["backward"] = Timed(lambda _: self.backward(waiting.pop(), gradients), setup, len(batches))
        return {**calls, "resident": Timed(step, sets=len(batches))}

    def step(self, batch: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        outputs = self.forward(batch)
        if self.parameters:
            self.backward(outputs, gradients)
        return outputs


class Gpu:
    """The GPU that is measured: its name, its ceilings, its clock, and the calls that are timed.

    Tests have one that is made up, with a link, a launch and kernels of stated speed.
    """

    def __init__(self, device: torch.device, cache_bytes: Callable[[str], int] = timing.cache_bytes) -> None:
        self.device = device
        self.clock = timing.CLOCK
        self.cache_bytes = cache_bytes

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def link(self) -> Link:
        return timing.link(str(self.device))

    def memory(self) -> float:
        return timing.memory_ceiling(str(self.device))

    def first_touch(self, model: nn.Module, batch: Sequence[Tensor]) -> FirstTouch:
        return in_fresh_processes(copy.deepcopy(model).cpu(), batch, self.device)

    def calls(self, model: nn.Module, batch: Sequence[Tensor], training: bool) -> dict[str, Timed]:
        """The calls that are timed for OnGpu's fields, by their names; batch lies in pageable memory."""
        work = Work(model, training, self.device)
        nbytes = sum(tensor.nbytes for tensor in batch)
        sets = min(64, timing.rotation(nbytes, self.cache_bytes("cuda")))
        there = [[tensor.to(self.device) for tensor in batch] for _ in range(sets)]
        outputs = work.forward(there[0])
        gradients = work.gradients(outputs)
        outputs = [each.detach() for each in outputs]
        pinned, loaded = ([tensor.pin_memory() for tensor in batch] for _ in range(2))
        one = torch.zeros(1, device=self.device)
        batches = iter(DevicePrefetcher(itertools.repeat(loaded), self.device))
        narrow = [tensor.bfloat16().pin_memory() if _is_wide(tensor) else tensor for tensor in loaded]
        narrowed = iter(DevicePrefetcher(itertools.repeat(narrow), self.device))

        def back(tensors: Iterable[Tensor]) -> None:
            for tensor in tensors:
                tensor.cpu()

        def stage(_: int) -> None:
            for target, source in zip(pinned, batch):
                target.copy_(source)

        def step(x: Sequence[Tensor]) -> None:
            made = work.step(x, gradients)
            if not training:
                back(made)

        def widened(x: Sequence[Tensor]) -> list[Tensor]:
            return [tensor.to(given.dtype) for tensor, given in zip(x, batch)]

        calls = {
            **copy_calls(batch, self.device),
            "to_host": Timed(lambda _: back(outputs), waits=True),
            "staging": Timed(stage),
            "launch": Timed(lambda _: one.fill_(1)),
            **work.calls(there),
            "step": Timed(lambda _: step([tensor.to(self.device) for tensor in batch])),
            "prefetched": Timed(lambda _: step(next(batches)), drain=partial(use_up, batches)),
            "non_waiting": Timed(lambda _: step([tensor.to(self.device, non_blocking=True) for tensor in loaded])),
        }
        if any(map(_is_wide, batch)):
            calls["narrowed"] = Timed(lambda _: step(widened(next(narrowed))), drain=partial(use_up, narrowed))
        return calls


def measure(
    model: nn.Module,
    batch: Tensor | Sequence[Tensor],
    *,
    sizes: Iterable[int] | None = None,
    training: bool = True,
    device: torch.device | str | None = None,
    first_touch: bool = True,
    seconds: float = timing.SECONDS,
) -> Transfer:
    """Take a network's time apart, on the GPU and on the CPU beside it. Neither model nor batch is changed or moved.

    Without a GPU the CPU's part is measured, and the record says what is missing.

    Args:
        model: any module, called as `model(*batch)`.
        batch: a tensor x (M, ...), or several that are the model's arguments; rows first.
        sizes: the batch sizes to measure besides M, made of batch's rows; default: from M/16 to 16 M.
        training: a step is forward and backward of every parameter; otherwise forward, and the output copied back.
        device: the GPU; default: the current one, where there is one. "cpu" measures the CPU alone.
        first_touch: whether to measure, in two fresh processes, what only the first call costs.
        seconds: spent on one number, about.

    Raises:
        TypeError: batch is neither a tensor nor several.
        ValueError: there are no rows; a size is below 1; the device is neither a GPU that is there nor the CPU; the
            environment has a switch that distorts a GPU's times; the model has nothing to train.
    """
    gpu: Gpu | None = None
    notes: list[str] = []
    chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {chosen}; it needs to be a CUDA or ROCm GPU, or cpu")
    if chosen.type == "cpu":
        why = "as asked for" if device is not None else f"no GPU that torch {torch.__version__} can use"
        notes.append(f"the GPU's part, which is copies, launches, kernels and first touch ({why})")
        if (reason := distorted("cpu")) is not None:
            notes.append(f"times that mean something ({reason})")
        return measure_on(None, model, batch, sizes, training, first_touch, seconds, notes)
    if not torch.cuda.is_available():
        raise ValueError(f"device is {chosen}, and torch {torch.__version__} can use none here; cpu always can be used")
    if (reason := distorted()) is not None:
        raise ValueError(reason)
    gpu = Gpu(torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index))
    with torch.cuda.device(gpu.device):
        return measure_on(gpu, model, batch, sizes, training, first_touch, seconds, notes)


def measure_on(
    gpu: Gpu | None,
    model: nn.Module,
    batch: Tensor | Sequence[Tensor],
    sizes: Iterable[int] | None,
    training: bool,
    first_touch: bool,
    seconds: float,
    notes: Sequence[str] = (),
    clock: timing.Clock = timing.CLOCK,
) -> Transfer:
    """`measure` on that GPU, or on the CPU alone, which is read by `clock`."""
    given = [batch] if isinstance(batch, Tensor) else list(batch)
    if not given or not all(isinstance(tensor, Tensor) for tensor in given):
        raise TypeError("batch needs to be a tensor, or several that are the model's arguments")
    given = [tensor.detach().cpu().contiguous() for tensor in given]
    if not given[0].dim() or not len(given[0]):
        raise ValueError(f"batch is of shape {tuple(given[0].shape)}; it needs to have rows")
    rows = len(given[0])
    wanted = {max(1, round(part * rows)) for part in LADDER} if sizes is None else _checked_sizes(sizes)
    if training and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("training is True, and no parameter of the model requires a gradient; set training=False")
    notes = list(notes)
    link = memory = first = None
    if gpu is not None:
        link, memory = gpu.link(), gpu.memory()
        if first_touch:
            try:
                first = gpu.first_touch(model, given)
            except RuntimeError as error:
                notes.append(f"first touch: {first_line(error)}")
    points: list[Point] = []
    try:
        for size in sorted(wanted | {rows}):
            points.append(_point(gpu, model, _take(given, size), training, seconds, clock))
    except torch.OutOfMemoryError as error:
        if not points or points[-1].rows < rows:  # what was asked about
            raise
        notes.append(f"{count(size, 'row', ',')} and more: {first_line(error)}")
    return Transfer(
        network=_describe(model, given),
        rows=rows,
        training=training,
        cpu=f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch",
        gpu=None if gpu is None else gpu.name,
        link=link,
        memory=memory,
        first_touch=first,
        points=tuple(points),
        notes=tuple(notes),
    )


def _checked_sizes(sizes: Iterable[object]) -> set[int]:
    given = list(sizes)
    wanted: set[int] = set()
    for size in given:
        rows = whole_number(size)
        if rows is None or rows < 1:
            raise ValueError(f"sizes is {given}; it needs to be whole numbers of rows, 1 or more")
        wanted.add(rows)
    return wanted


def _take(batch: Sequence[Tensor], size: int) -> list[Tensor]:
    """So many rows, over and over; tensors without those rows stay as they are."""
    rows = len(batch[0])
    order = torch.arange(size) % rows
    return [tensor[order] if tensor.dim() and len(tensor) == rows else tensor for tensor in batch]


def _is_wide(tensor: Tensor) -> bool:
    """True for float32: 16 bits are half the bytes, and autocast computes on them. It leaves float64 as it is."""
    return tensor.dtype == torch.float32


def _describe(model: nn.Module, batch: Sequence[Tensor]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs = ", ".join(f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)}" for tensor in batch)
    return f"{type(model).__name__}, {parameters:,} parameters, input {inputs}"


def _point(
    gpu: Gpu | None, model: nn.Module, batch: Sequence[Tensor], training: bool, seconds: float, clock: timing.Clock
) -> Point:
    work = Work(model, training, "cpu")
    outputs = work.forward(batch)
    found = {name: timing.time_host(timed, seconds, clock) for name, timed in work.calls([batch]).items()}
    parameters = sum(parameter.nbytes for parameter in work.model.parameters())
    bytes_in, bytes_out = (sum(tensor.nbytes for tensor in tensors) for tensors in (batch, outputs))
    on_gpu = None
    if gpu is not None:
        read: dict[str, Any] = {}
        for name, timed in gpu.calls(model, batch, training).items():
            reader = timing.time_host if name == "staging" else timing.time_loop if name in LOOPS else timing.time_apart
            read[name] = reader(timed, seconds, gpu.clock)
        on_gpu = OnGpu(**{"backward": None, "narrowed": None, **read})
    return Point(
        rows=len(batch[0]),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        least=(bytes_in + bytes_out + parameters, bytes_in + bytes_out + 2 * parameters),
        cpu=OnCpu(found["forward"], found.get("backward"), found["resident"]),
        gpu=on_gpu,
    )
