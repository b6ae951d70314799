"""Schedules: the steps of a pass in order, over named buffers.

A path writes a schedule once for a batch size and the gradients that are wanted. Everything else reads the schedule.
The first run goes through Triton. Later runs replay one list of compiled kernels, with new pointers. Compiling ahead
and `explain` use the same steps. The profiler's ranges, the checks of MLP_FUSED_DEBUG and the counts of launches are
all added here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.language import allocation, driver
from ..kernels.launch import Launch, counters, has_descriptor_strides, is_hooked
from ..kernels.planes import PLANES
from ..kernels.tile_config import Problem, TileConfig
from . import settings
from .tables import Choice

__all__ = ["Buffer", "LaunchSequence", "Layers", "Schedule", "Step", "Work", "Writer", "names_in", "read_pointers"]


@dataclass(frozen=True)
class Work:
    """FLOPs, where a multiply-add counts as two, and bytes read from and written to the device's memory."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The shortest time in seconds: max(FLOPs / peak, bytes / bandwidth)."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Step:
    """One launch of a kernel, or one call of torch.

    Attributes:
        kind: the name of the computation, such as "dgrad".
        layer: the name of the layer, such as "layer 0 (relu)".
        label: the layer in a table, such as "0: 784 -> 512".
        operands: the name of the buffer for each argument of `run`, in the order of the kernel's tensors. A kernel may
            take a tuple of tensors; torch may not.
        writes: the arguments that are written; the others are read.
        run: a function that takes the tensors by name. It returns the launch, to replay it, or None if torch runs.
        work: FLOPs and bytes of the step.
        problem: the problem of a product; None for other steps.
        tile: the tile of the kernel; None if torch runs.
        source: the origin of the choice of this tile, or of torch.
    """

    kind: str
    layer: str
    label: str
    operands: Mapping[str, Any]
    writes: tuple[str, ...]
    run: Callable[..., Launch | None]
    work: Work = Work(0, 0)
    problem: Problem | None = None
    tile: TileConfig | None = None
    source: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        """The arguments that are read."""
        return tuple(argument for argument in self.operands if argument not in self.writes)

    @property
    def name(self) -> str:
        """The layer and the kind."""
        return self.kind if self.kind.startswith(self.layer) else f"{self.layer}: {self.kind}"


@dataclass(frozen=True)
class Buffer:
    """Memory that a schedule allocates, contiguous unless strides are given; or a part of another buffer.

    Attributes:
        base: the name of the buffer that this one is a part of; None if it is allocated itself.
        start: the offset of the part, in elements of this buffer's dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    base: str | None = None
    start: int = 0
    strides: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @functools.cached_property
    def stride(self) -> tuple[int, ...]:
        """The strides, in elements."""
        if self.strides is not None:
            return self.strides
        return tuple(itertools.accumulate(reversed(self.shape[1:]), operator.mul, initial=1))[::-1]

    def view(self, whole: Any) -> Tensor:
        """This part of the buffer `whole`."""
        if whole.dtype != self.dtype:
            whole = whole.view(self.dtype)
        return torch.as_strided(whole, self.shape, self.stride, whole.storage_offset() + self.start)


Replay = Callable[[list[Any], list[Any]], object]  # a function of all tensors and all pointers
Item = tuple[Launch, Sequence[int]] | Callable[[list[Any]], object]  # a kernel, or a function of all tensors

CHECKED = ("h", "dz", "dx", "dw", "db")  # the arguments that MLP_FUSED_DEBUG checks


class LaunchSequence:
    """Compiled kernels and calls of torch, which run one after the other on one device, with new pointers and tensors.

    The device and its stream are looked up once for all of them. Memory has to be 16-byte aligned.

    Args:
        items: launches that have run before, each with the indices of its pointers in the list of all pointers; or
            functions of the list of all tensors.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.launches = [item[0] for item in items if isinstance(item, tuple)]
        self.index = next((launch.index for launch in self.launches), None)
        self.allocate = next((launch.allocate for launch in self.launches if launch.needs_scratch), None)
        self.steps: list[tuple[Any, ...]] = [
            (item[0].run, item[0].programs, item[0].binary, _take(item[1]), item[0].rest)
            if isinstance(item, tuple)
            else (item, 0, (), None, ())
            for item in items
        ]

    def __call__(self, tensors: Sequence[Any], pointers: Sequence[Any]) -> None:
        """Launch all kernels, and call the functions between them."""
        index = self.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self(tensors, pointers)
        for launch in self.launches if counters else ():
            launch.count()
        stream = 0 if index is None else driver.active.get_current_stream(index)
        token = allocation._allocator.set(self.allocate) if self.allocate else None
        try:
            for run, programs, binary, take, rest in self.steps:
                if programs:
                    run(programs, 1, 1, stream, *binary, None, None, None, *take(pointers), *rest)
                else:
                    run(tensors)
        finally:
            if token is not None:
                allocation._allocator.reset(token)
        return None


def _take(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that returns the items at these indices, as a tuple."""
    take = operator.itemgetter(*indices)
    return take if len(indices) > 1 else lambda items: (take(items),)


class Schedule:
    """Steps that work on the caller's tensors and on buffers of the schedule.

    Args:
        given: the names of the caller's tensors, in the order in which `run` takes them.
        buffers: the allocated buffers and their parts, by name.
        returned: the names of the tensors that `run` returns; None gives None.
        steps: the steps, in order.
        is_aligned: True if all given tensors are 16-byte aligned in every run.
    """

    def __init__(
        self,
        given: Sequence[str],
        buffers: Mapping[str, Buffer],
        returned: Sequence[str | None],
        steps: Sequence[Step],
        is_aligned: bool = True,
    ) -> None:
        self.given = tuple(given)
        self.buffers = dict(buffers)
        self.returned = tuple(returned)
        self.steps = tuple(steps)
        self.is_aligned = is_aligned
        allocated = {name: buffer for name, buffer in buffers.items() if buffer.base is None}
        parts = {name: buffer for name, buffer in buffers.items() if buffer.base is not None}
        by_torch = names_in(operand for step in steps if step.tile is None for operand in step.operands.values())
        viewed = [name for name in parts if name in by_torch]  # torch needs tensors; kernels need pointers only
        parts = {name: parts[name] for name in viewed} | parts
        groups = dict.fromkeys(names for step in steps for names in step.operands.values() if isinstance(names, tuple))
        # The index of each operand in the list of pointers. An operand is a tensor, None, or a tuple of tensors.
        self._indices: dict[Any, int] = {
            name: index for index, name in enumerate((*self.given, *allocated, None, *parts, *groups))
        }
        self._allocated = list(allocated.values())
        self._templates: list[Tensor] | None = None
        self._parts = [(self._indices[buffer.base], buffer.start * buffer.dtype.itemsize) for buffer in parts.values()]
        self._views = [(self._indices[parts[name].base], parts[name]) for name in viewed]
        self._groups = [_take([self._indices[name] for name in group]) for group in groups]
        self._returned = [self._indices[name] for name in self.returned]
        self._launches: list[Launch | None] = [None] * len(self.steps)
        self._replays: list[Replay] = []  # one for each step
        self._sequence: LaunchSequence | None = None  # the replay of all steps at once, if memory is always aligned

    @property
    def workspace_bytes(self) -> int:
        """The bytes of buffers that are neither given nor returned, allocated while the steps run."""
        workspace = self.buffers.get(WORKSPACE)
        return 0 if workspace is None else workspace.size * workspace.dtype.itemsize

    def run(self, tensors: Sequence[Tensor | None], pointers: list[Any]) -> list[Any]:
        """Run all steps on the caller's tensors. `pointers` are their addresses, as `read_pointers` returns them.

        Returns:
            The tensors that `returned` names.
        """
        templates = self._templates
        if templates is None:
            templates = self._templates = self._make_templates(tensors[0])
        allocated = [*map(torch.empty_like, templates)]
        everything = [*tensors, *allocated, None]
        if not self._replays or is_hooked():
            self._run_steps(everything)
        else:
            pointers += map(Tensor.data_ptr, allocated)
            pointers.append(None)
            for index, at in self._parts:
                pointers.append(pointers[index] + at)
            for group in self._groups:
                pointers.append(group(pointers))
            for index, part in self._views:
                everything.append(part.view(everything[index]))
            if self._sequence is not None and not settings.profiler_enabled():
                self._sequence(everything, pointers)
            else:
                for step, replay in zip(self.steps, self._replays):
                    with _profiled(step):
                        replay(everything, pointers)
        return [everything[index] for index in self._returned]

    def _make_templates(self, first: Any) -> list[Tensor]:
        """Tensors with the buffers' shapes and no memory, as arguments of `torch.empty_like`.

        `empty_like` takes two thirds of the time of `new_empty`. If the templates had memory, it would outlive a CUDA
        graph that the first run is captured into, which torch.compile's mode "reduce-overhead" forbids.
        """
        templates = [
            first.new_empty(1, dtype=buffer.dtype).expand(buffer.shape)
            if buffer.size  # an expanded tensor without elements would have strides of 0
            else first.new_empty(buffer.shape, dtype=buffer.dtype)
            for buffer in self._allocated
        ]
        for template in templates:
            template.untyped_storage().resize_(0)
        return templates

    def _run_steps(self, everything: list[Tensor | None]) -> None:
        """Run the steps one by one, and cache the launches for a replay."""
        for index, step in enumerate(self.steps):
            with _profiled(step):
                self._run_step(index, everything)
        if not self._replays and not settings.DEBUG:  # a replay could not check results between steps
            self._prepare_replays()

    def _run_step(self, index: int, everything: list[Tensor | None], pointers: object = None) -> None:
        """Run a step; kernels go through Triton's launcher."""
        step, launch = self.steps[index], self._launches[index]
        operands = {name: self._operand(everything, operand) for name, operand in step.operands.items()}
        if settings.DEBUG:
            run_checked(step, operands)
        elif launch is not None:
            launch.through_triton(tuple(operands.values()))
        else:
            self._launches[index] = step.run(**operands)

    def _operand(self, everything: list[Tensor | None], operand: Any) -> Any:
        """The tensor with the name `operand`; for a tuple of names, a tuple of tensors."""
        if isinstance(operand, tuple):
            return tuple(self._operand(everything, name) for name in operand)
        if operand is None:
            return None
        buffer = self.buffers.get(operand)
        if buffer is None or buffer.base is None:
            return everything[self._indices[operand]]
        return buffer.view(everything[self._indices[buffer.base]])

    def _prepare_replays(self) -> None:
        """Prepare later runs: compiled kernels get new pointers; other steps run as before."""
        if any(launch is not None and launch.programs and launch.run is None for launch in self._launches):
            return  # a kernel was only compiled ahead, or runs in the interpreter
        items = list(map(self._item, range(len(self.steps))))
        if self.is_aligned:
            self._sequence = LaunchSequence(items)
        # Last, because other threads replay as soon as it is set.
        self._replays = [self._replay(index, LaunchSequence([item])) for index, item in enumerate(items)]

    def _replay(self, index: int, sequence: LaunchSequence) -> Replay:
        """The replay of one step. If memory may be misaligned, every run checks whether its launch can be used."""
        if self.is_aligned or not sequence.launches:
            return sequence
        return functools.partial(_replay_if_aligned, sequence, functools.partial(self._run_step, index))

    def _item(self, index: int) -> Item:
        """An item of a `LaunchSequence`: a compiled kernel, torch's function, or a call of Triton's launcher."""
        step, launch = self.steps[index], self._launches[index]
        if launch is not None and launch.run is not None:
            return launch, [self._indices[operand] for operand in step.operands.values()]
        if step.tile is not None:
            return functools.partial(self._run_step, index)
        run, parameters = step.run, inspect.signature(step.run).parameters  # keyword arguments would take 0.6 µs more
        take = _take([self._indices[step.operands[name]] for name in parameters])
        return lambda tensors: run(*take(tensors))


def _profiled(step: Step) -> contextlib.AbstractContextManager[Any]:
    """A range of the profiler with the name of a step, if a profiler is active."""
    return torch.profiler.record_function(step.name) if settings.profiler_enabled() else contextlib.nullcontext()


def _replay_if_aligned(sequence: LaunchSequence, run_step: Replay, everything: list[Any], pointers: list[Any]) -> None:
    """Launch a sequence of one kernel if its memory is aligned; otherwise call `run_step`."""
    ((_, _, _, take, _),) = sequence.steps
    nested = (operand if type(operand) is tuple else (operand,) for operand in take(pointers))
    is_aligned = math.gcd(16, *filter(None, itertools.chain.from_iterable(nested))) == 16
    (sequence if is_aligned else run_step)(everything, pointers)


def wait(device: torch.device | None) -> None:
    """Wait for all launches on a device. Their errors are raised here."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def run_checked(
    step: Step, operands: dict[str, Any], wait: Callable[[torch.device | None], None] = wait
) -> Launch | None:
    """Run a step, wait for it and check its results.

    Raises:
        FloatingPointError: a result is NaN or infinite.
    """
    where = f"{step.layer}, {step.kind}"
    device = next((tensor.device for tensor in operands.values() if isinstance(tensor, Tensor)), None)
    wait(device)  # raises the errors of earlier launches, which are not this step's
    try:
        launch = step.run(**operands)
        wait(device)
    except RuntimeError as error:
        error.args = (f"{where}: {error}",)
        raise
    if step.tile is not None and step.tile.precision in PLANES:
        return launch  # the next step computes some of the results again
    for name, tensor in operands.items():
        if name not in step.writes or name not in CHECKED or tensor is None:
            continue
        if bad := int(tensor.numel() - tensor.isfinite().sum()):
            raise FloatingPointError(f"{where}: {bad} of {tensor.numel()} elements of {name} are NaN or infinite")
    return launch


def read_pointers(tensors: Sequence[Tensor | None]) -> tuple[list[int | None], bool]:
    """(the addresses of tensors, True if all are multiples of 16 bytes)."""
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return pointers, math.gcd(16, *filter(None, pointers)) == 16


BY_TORCH = Choice(None, "")


class Layers(Protocol):
    """One or several layers, with a name for messages and a label for tables."""

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...


@dataclass
class Writer:
    """A schedule that is being written.

    Attributes:
        given: the caller's tensors by name, or tensors like them; None for one that is not given.
        dtype: the default dtype of buffers.
        rows: the batch size.
    """

    given: Mapping[str, Tensor | None]
    dtype: torch.dtype
    rows: int
    buffers: dict[str, Buffer] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """True if the tensors are on a GPU, or stand for tensors on one."""
        return any(tensor is not None and tensor.device.type != "cpu" for tensor in self.given.values())

    def find(self, name: str) -> str | None:
        """`name`, if there is a tensor with this name; else None."""
        return name if name in self.buffers or self.given.get(name) is not None else None

    def add(
        self,
        kind: str,
        layer: Layers,
        operands: Mapping[str, Any],
        writes: tuple[str, ...],
        run: Callable[..., Launch | None],
        *,
        flops: int = 0,
        problem: Problem | None = None,
        choice: Choice = BY_TORCH,
        moved: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a step. Its work counts the bytes of its operands, each read or written once.

        Args:
            moved: the tensors whose bytes count, if they are not the operands.
        """
        moved = operands if moved is None else moved
        read = names_in(operand for name, operand in moved.items() if name not in writes)
        written = names_in(map(moved.get, writes))
        work = Work(flops, sum(map(self._size, read)) + sum(map(self._size, written)))
        self.steps.append(
            Step(kind, layer.name, layer.label, operands, writes, run, work, problem, choice.tile, choice.source)
        )

    def rewrite(self, index: int, argument: str, operand: Any) -> None:
        """Let a step write another operand, or None, for an argument.

        The bytes of its work change too, unless none were counted, as for "redo".
        """
        step = self.steps[index]
        more = sum(map(self._size, names_in([operand]))) - sum(map(self._size, names_in([step.operands[argument]])))
        work = step.work + Work(0, more) if step.work.bytes else step.work
        self.steps[index] = replace(step, operands={**step.operands, argument: operand}, work=work)

    def base(self, name: str) -> str:
        """The name of the buffer or given tensor that the tensor `name` is a part of; `name` itself if it is whole."""
        buffer = self.buffers.get(name)
        return name if buffer is None or buffer.base is None else buffer.base

    def _size(self, name: str | None) -> int:
        """The bytes of the tensor or buffer with this name."""
        buffer, tensor = self.buffers.get(name or ""), self.given.get(name or "")
        if buffer is not None:
            return buffer.size * buffer.dtype.itemsize
        return 0 if tensor is None else tensor.numel() * tensor.element_size()

    def allocate(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> str:
        self.buffers[name] = Buffer(shape, dtype or self.dtype)
        return name

    def part(self, name: str, base: str, start: int, *shape: int, strides: tuple[int, ...] | None = None) -> str:
        """Name a part of an allocated buffer, or of a given tensor of the schedule's dtype."""
        dtype = self.buffers[base].dtype if base in self.buffers else self.dtype
        self.buffers[name] = Buffer(shape, dtype, base, start, strides)
        return name

    def share(self, name: str, base: str, *shape: int, dtype: torch.dtype | None = None) -> str:
        """Name a tensor in a buffer that several tensors use in turn. The buffer has the size of the largest one."""
        shared = self.buffers.get(base)
        if shared is None or shared.size < math.prod(shape):
            self.allocate(base, math.prod(shape), dtype=dtype)
        return self.part(name, base, 0, *shape)

    @functools.cached_property
    def is_aligned(self) -> bool:
        """True if every given tensor is 16-byte aligned. The two cases have different schedules."""
        return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in self.given.values())

    def are_describable(self, *names: str | None) -> bool:
        """True if tensor descriptors can describe these (rows, columns) tensors: see `launch.describable`."""
        return all(self._is_describable(name) for name in names if name is not None)

    def _is_describable(self, name: str) -> bool:
        buffer = self.buffers.get(name)
        if buffer is not None:
            is_aligned = self.is_aligned or buffer.base not in self.given
            return is_aligned and has_descriptor_strides(buffer.stride, buffer.dtype.itemsize)
        tensor = self.given[name]
        assert tensor is not None
        return self.is_aligned and has_descriptor_strides(tensor.stride(), tensor.itemsize)

    def finish(self, *returned: str | None) -> Schedule:
        """The finished schedule. Buffers that are neither given nor returned share one allocation, the workspace."""
        used = names_in(step.operands.values() for step in self.steps) | set(returned)
        used |= {buffer.base for name, buffer in self.buffers.items() if name in used}
        buffers = {name: buffer for name, buffer in self.buffers.items() if name in used}
        start = 0
        inner: dict[str, int] = {}  # offsets in the workspace, in bytes
        for name, buffer in buffers.items():
            if buffer.base is None and name not in returned:
                inner[name] = start
                start += -(-buffer.size * buffer.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        placed = {WORKSPACE: Buffer((start // self.dtype.itemsize,), self.dtype)} if inner else {}
        for name, buffer in buffers.items():
            base = name if buffer.base is None else buffer.base
            if base in inner:
                at = inner[base] // buffer.dtype.itemsize + buffer.start
                placed[name] = replace(buffer, base=WORKSPACE, start=at)
            else:
                placed[name] = buffer
        return Schedule(tuple(self.given), placed, returned, self.steps, self.is_aligned)


WORKSPACE = "workspace"
ALIGNMENT = 512  # bytes; torch's allocator aligns to the same


def names_in(operands: Iterable[Any]) -> set[str | None]:
    """The names of the tensors in operands, which may be names, None, or tuples of operands."""
    names: set[str | None] = set()
    for operand in operands:
        if isinstance(operand, str) or operand is None:
            names.add(operand)
        else:
            names |= names_in(operand)
    return names
