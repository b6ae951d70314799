"""Measure the parts of a network's time on a GPU, and compare it with the CPU.

The first call on a GPU creates the context, allocates memory and compiles kernels. Every call copies its input,
launches kernels, and waits for them. `measure` measures each of these parts for your network and batch, and the time on
the CPU.
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

LADDER = (1 / 16, 1 / 4, 1, 4, 16)  # the default `sizes`, as multiples of the batch size
LOOPS = ("resident", "step", "prefetched", "non_waiting", "narrowed")  # fields of OnGpu that are measured as a loop


def copy_calls(host: Sequence[Tensor], device: torch.device) -> dict[str, Timed]:
    """Return three copies of pageable tensors to the device, by name: pageable, pinned, and pinned non_blocking."""
    pinned = [tensor.pin_memory() for tensor in host]
    targets = [torch.empty_like(tensor, device=device) for tensor in host]

    def copies(sources: Sequence[Tensor], non_blocking: bool) -> Callable[[int], None]:
        def call(_: int) -> None:
            for target, source in zip(targets, sources):
                target.copy_(source, non_blocking=non_blocking)

        return call

    return {
        "pageable": Timed(copies(host, False), waits=True),
        "pinned": Timed(copies(pinned, False), waits=True),
        "non_blocking": Timed(copies(pinned, True)),
    }


class Work:
    """Forward, backward and a step of a network on a device. The network is a copy of `model`."""

    def __init__(self, model: nn.Module, training: bool, device: torch.device | str) -> None:
        self.model = copy.deepcopy(model).to(device).train(training)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad] if training else []

    def forward(self, batch: Sequence[Tensor]) -> list[Tensor]:
        """Return the output tensors; in training, those that require a gradient."""
        with torch.set_grad_enabled(bool(self.parameters)):
            outputs = [leaf for leaf in tree_leaves(self.model(*batch)) if isinstance(leaf, Tensor)]
        return [output for output in outputs if output.requires_grad] if self.parameters else outputs

    def gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return random gradients of the outputs; none for inference."""
        return [torch.randn_like(output) for output in outputs] if self.parameters else []

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Compute the gradients of all parameters."""
        torch.autograd.grad(outputs, self.parameters, gradients, allow_unused=True)

    def calls(self, batches: Sequence[Sequence[Tensor]]) -> dict[str, Timed]:
        """Return the calls to time, by name: forward, backward in training, and a step. They cycle through batches."""
        gradients = self.gradients(self.forward(batches[0]))
        pending: list[Sequence[Tensor]] = []  # the outputs of the forward before a backward

        def setup(i: int) -> None:
            pending[:] = [self.forward(batches[i])]

        def step(i: int) -> None:
            self.step(batches[i], gradients)

        calls = {"forward": Timed(lambda i: self.forward(batches[i]), sets=len(batches))}
        if self.parameters:
            calls["backward"] = Timed(lambda _: self.backward(pending.pop(), gradients), setup, len(batches))
        return {**calls, "resident": Timed(step, sets=len(batches))}

    def step(self, batch: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Run forward and, in training, backward. Return the outputs."""
        outputs = self.forward(batch)
        if self.parameters:
            self.backward(outputs, gradients)
        return outputs


class Gpu:
    """A GPU to measure: its name, its ceilings, its clock, and the calls to time.

    Tests pass in a simulated GPU, with given speeds of link, launches and kernels.
    """

    def __init__(self, device: torch.device, cache_bytes: Callable[[str], int] = timing.cache_bytes) -> None:
        self.device = device
        self.clock = timing.CLOCK
        self.cache_bytes = cache_bytes

    @property
    def name(self) -> str:
        """The name of the GPU."""
        return torch.cuda.get_device_name(self.device)

    def link(self) -> Link:
        """Measure the rates of the link to the host, in bytes/s."""
        return timing.link(str(self.device))

    def memory(self) -> float:
        """Measure the rate of a large copy in the GPU's memory, in bytes/s, read plus written."""
        return timing.memory_ceiling(str(self.device))

    def first_touch(self, model: nn.Module, batch: Sequence[Tensor]) -> FirstTouch:
        """Measure the one-time costs of a process, in two new processes."""
        return in_fresh_processes(copy.deepcopy(model).cpu(), batch, self.device)

    def calls(self, model: nn.Module, batch: Sequence[Tensor], training: bool) -> dict[str, Timed]:
        """Return the calls to time, by the names of OnGpu's fields. `batch` is in pageable memory."""
        work = Work(model, training, self.device)
        nbytes = sum(tensor.nbytes for tensor in batch)
        sets = min(64, timing.rotation(nbytes, self.cache_bytes("cuda")))
        resident = [[tensor.to(self.device) for tensor in batch] for _ in range(sets)]
        outputs = work.forward(resident[0])
        gradients = work.gradients(outputs)
        outputs = [output.detach() for output in outputs]
        pinned, loaded = ([tensor.pin_memory() for tensor in batch] for _ in range(2))
        number = torch.zeros(1, device=self.device)
        batches = iter(DevicePrefetcher(itertools.repeat(loaded), self.device))
        narrow = [tensor.bfloat16().pin_memory() if _is_wide(tensor) else tensor for tensor in loaded]
        narrowed = iter(DevicePrefetcher(itertools.repeat(narrow), self.device))

        def copy_to_host(tensors: Iterable[Tensor]) -> None:
            for tensor in tensors:
                tensor.cpu()

        def stage(_: int) -> None:
            for target, source in zip(pinned, batch):
                target.copy_(source)

        def step(x: Sequence[Tensor]) -> None:
            results = work.step(x, gradients)
            if not training:
                copy_to_host(results)

        def widen(x: Sequence[Tensor]) -> list[Tensor]:
            return [tensor.to(original.dtype) for tensor, original in zip(x, batch)]

        calls = {
            **copy_calls(batch, self.device),
            "to_host": Timed(lambda _: copy_to_host(outputs), waits=True),
            "staging": Timed(stage),
            "launch": Timed(lambda _: number.fill_(1)),
            **work.calls(resident),
            "step": Timed(lambda _: step([tensor.to(self.device) for tensor in batch])),
            "prefetched": Timed(lambda _: step(next(batches)), drain=partial(use_up, batches)),
            "non_waiting": Timed(lambda _: step([tensor.to(self.device, non_blocking=True) for tensor in loaded])),
        }
        if any(map(_is_wide, batch)):
            calls["narrowed"] = Timed(lambda _: step(widen(next(narrowed))), drain=partial(use_up, narrowed))
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
    """Measure the parts of a network's time on the GPU, and its time on the CPU. Model and batch stay unchanged.

    Without a GPU, only the CPU is measured, and the result's `notes` name the missing parts.

    Args:
        model: any module, called as `model(*batch)`.
        batch: a tensor x (M, ...), or several tensors, the arguments of the model. The first dimension is the rows.
        sizes: further batch sizes to measure, made by repeating or cutting rows; by default from M/16 to 16 M.
        training: True for steps of forward and backward; False for steps of forward and a copy of the output to the
            host.
        device: the GPU; by default the current one, if there is one. With "cpu", only the CPU is measured.
        first_touch: True to measure the one-time costs of a process, in two new processes.
        seconds: the approximate time spent on each measured number.

    Raises:
        TypeError: `batch` is neither a tensor nor a sequence of tensors.
        ValueError: the batch has no rows, a size is below 1, the device is neither "cpu" nor a GPU of this machine, a
            debug switch in the environment distorts the times of a GPU, or `training` is True for a model without
            trainable parameters.
    """
    gpu: Gpu | None = None
    notes: list[str] = []
    try:
        chosen = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; it needs to be a CUDA or ROCm GPU, or cpu") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {chosen}; it needs to be a CUDA or ROCm GPU, or cpu")
    if chosen.type == "cpu":
        why = "device is cpu" if device is not None else f"torch {torch.__version__} can use no GPU here"
        notes.append(f"the GPU's copies, launches, kernels and first touch ({why})")
        if (reason := distorted("cpu")) is not None:
            notes.append(f"undistorted times ({reason})")
        return measure_on(None, model, batch, sizes, training, first_touch, seconds, notes)
    if not torch.cuda.is_available():
        raise ValueError(f"device is {chosen}, but torch {torch.__version__} can use no GPU here; use device='cpu'")
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
    """Do the work of `measure`, on the GPU `gpu` or without a GPU. `clock` times the CPU."""
    tensors = [batch] if isinstance(batch, Tensor) else list(batch)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError("batch needs to be a tensor or a sequence of tensors, the arguments of the model")
    tensors = [tensor.detach().cpu().contiguous() for tensor in tensors]
    if not tensors[0].dim() or not len(tensors[0]):
        raise ValueError(f"batch has the shape {tuple(tensors[0].shape)}; it needs at least one row")
    rows = len(tensors[0])
    all_sizes = {max(1, round(multiple * rows)) for multiple in LADDER} if sizes is None else _checked_sizes(sizes)
    if training and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("training is True, but no parameter of the model requires a gradient; set training=False")
    notes = list(notes)
    link = memory = first = None
    if gpu is not None:
        link, memory = gpu.link(), gpu.memory()
        if first_touch:
            try:
                first = gpu.first_touch(model, tensors)
            except RuntimeError as error:
                notes.append(f"first touch: {first_line(error)}")
    points: list[Point] = []
    try:
        for size in sorted(all_sizes | {rows}):
            points.append(_point(gpu, model, _take(tensors, size), training, seconds, clock))
    except torch.OutOfMemoryError as error:
        if not points or points[-1].rows < rows:  # the batch size of `batch` itself must be measured
            raise
        notes.append(f"{count(size, 'row', ',')} and more: {first_line(error)}")
    return Transfer(
        network=_describe(model, tensors),
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
    values = list(sizes)
    checked: set[int] = set()
    for size in values:
        rows = whole_number(size)
        if rows is None or rows < 1:
            raise ValueError(f"sizes is {values}; it needs to be whole numbers of rows, 1 or more")
        checked.add(rows)
    return checked


def _take(batch: Sequence[Tensor], size: int) -> list[Tensor]:
    """Return a batch of `size` rows, by repeating or cutting rows. Tensors with another number of rows stay as is."""
    rows = len(batch[0])
    order = torch.arange(size) % rows
    return [tensor[order] if tensor.dim() and len(tensor) == rows else tensor for tensor in batch]


def _is_wide(tensor: Tensor) -> bool:
    """True for float32, which could be copied in 16 bits. Autocast would compute with these, but not with float64."""
    return tensor.dtype == torch.float32


def _describe(model: nn.Module, batch: Sequence[Tensor]) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs = ", ".join(f"{tuple(tensor.shape)} {dtype_name(tensor.dtype)}" for tensor in batch)
    return f"{type(model).__name__}, {parameters:,} parameters, input {inputs}"


def _point(
    gpu: Gpu | None, model: nn.Module, batch: Sequence[Tensor], training: bool, seconds: float, clock: timing.Clock
) -> Point:
    """Measure one batch size."""
    work = Work(model, training, "cpu")
    outputs = work.forward(batch)
    cpu = {name: timing.time_host(timed, seconds, clock) for name, timed in work.calls([batch]).items()}
    parameters = sum(parameter.nbytes for parameter in work.model.parameters())
    bytes_in, bytes_out = (sum(tensor.nbytes for tensor in tensors) for tensors in (batch, outputs))
    on_gpu = None
    if gpu is not None:
        times: dict[str, Any] = {}
        for name, timed in gpu.calls(model, batch, training).items():
            timer = timing.time_host if name == "staging" else timing.time_loop if name in LOOPS else timing.time_apart
            times[name] = timer(timed, seconds, gpu.clock)
        on_gpu = OnGpu(**{"backward": None, "narrowed": None, **times})
    return Point(
        rows=len(batch[0]),
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        least=(bytes_in + bytes_out + parameters, bytes_in + bytes_out + 2 * parameters),
        cpu=OnCpu(cpu["forward"], cpu.get("backward"), cpu["resident"]),
        gpu=on_gpu,
    )
