"""The plan for a batch: paths with their reasons, kernels, tiles, FLOPs, bytes, and the floor of the time."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .dtypes import dtype_name
from .engine.autograd import sections
from .engine.layer_path import SEED, LayerPath
from .engine.network_path import NetworkPath
from .engine.paths import (
    TORCH_IS_FASTER,
    dtype_precision,
    find_layers,
    find_network,
    layer_widths,
    measured_path,
    wants_gradients,
    why_not,
)
from .engine.recognize import resolve
from .engine.runs import (
    LinearWithActivation,
    find_runs,
    is_linear,
    is_split,
    linear_weight,
    module_name,
    stand_in,
)
from .engine.schedule import Schedule, Step, Work
from .engine.section import parameter_names
from .engine.settings import HOOKS, compute_dtype, is_loaded_instance, policy_dtype, storage_id
from .errors import count, listed, whole_number
from .kernels import devices
from .kernels.activation import Activation
from .kernels.activations import IDENTITY
from .kernels.language import NOT_INSTALLED, WHY_NO_TRITON
from .reference import Layer

__all__ = ["Plan", "RunPlan", "Work", "checked_rows", "explain", "make_schedules", "meta_layers", "work"]

MOST_ROWS = 2**40  # more than any memory holds; the bytes of much larger batches overflow torch's 64 bits


def make_schedules(
    path: NetworkPath | LayerPath, x: Tensor, layers: Sequence[Layer], device: devices.Device
) -> tuple[list[Schedule], list[Schedule], int]:
    """The schedules of a forward, those of its backward, and the bytes saved in between, without the parameters.

    There is one schedule for each section, in the order in which they run. The bytes of a kernel count every operand
    read once and every output written once, as if operands stayed in cache. The bytes of partial sums count in the step
    that adds them.

    Args:
        x, layers: the input and the layers, for their shapes, strides, dtypes and `requires_grad`. Their values are not
            read.
    """

    def meta(*shape: int, dtype: torch.dtype = path.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = x.shape[0]
    weights, biases, *_ = zip(*layers)
    parameters = dict(zip(parameter_names(0, len(layers)), (*weights, *biases)))
    edge = x.to(path.dtype) if isinstance(path, LayerPath) else x
    seed = meta(1, dtype=torch.int64) if path.drops else None
    forwards: list[Schedule] = []
    backwards: list[Schedule] = []
    saved: set[Tensor] = set()
    for section, needs in sections(path, x, weights, biases):
        given: dict[str, Any] = {name: parameters[name] for name in section.parameters}
        given |= {"h": edge, "x": edge, "seed": seed}
        forwards.append(section.write_forward(given, rows, needs, device))
        edge = meta(rows, section.widths[-1])  # to the next section
        if needs is not None:
            shapes = section.saved_shapes(rows, needs)
            given |= {"dy": edge} | {name: meta(*shape) for name, shape in shapes.items() if name not in given}
            backwards.insert(0, section.write_backward(given, rows, needs, device))
            saved.update(given[name] for name in shapes)
    return forwards, backwards, sum(tensor.nbytes for tensor in saved)


def work(
    rows: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    activation: str | Activation = "relu",
    *,
    bias: bool = True,
    device: devices.Device | None = None,
    precision: str = "ieee",
) -> dict[str, Work]:
    """The work of a network on its path, as {"inference": ..., "forward": ..., "backward": ...}.

    "forward" is the forward of training, which also writes the saved tensors. `widths` are in -> hidden ... -> out. The
    input needs no gradient. Without a device, the path is the layer path.
    """
    activations = [resolve(activation)] * (len(widths) - 2) + [IDENTITY]
    x = torch.empty((rows, widths[0]), dtype=dtype, device="meta")

    def total(training: bool, backward: bool) -> Work:
        layers = meta_layers(widths, activations, dtype, bias, training)
        path: NetworkPath | LayerPath | str = ""
        if device is not None:
            path = find_network(x, layers, dtype, None, precision, training, torch_too=True, device=device)
        if isinstance(path, str):
            path = find_layers(x, layers, dtype, "triton", precision)
        forwards, backwards, _ = make_schedules(path, x, layers, device or devices.INTERPRETED_DEVICE)
        # Partial sums and planes depend on the kernels, not on the network, so they do not count.
        steps = (step for schedule in (backwards if backward else forwards) for step in schedule.steps)
        return sum((step.work for step in steps if step.kind not in ("sum_partials", "split")), Work(0, 0))

    return {"inference": total(False, False), "forward": total(True, False), "backward": total(True, True)}


def meta_layers(
    widths: Sequence[int],
    activations: Sequence[Activation],
    dtype: torch.dtype,
    bias: bool = True,
    training: bool = True,
) -> list[Layer]:
    """Layers on the device "meta", which have shapes but no values. With `training`, they need gradients."""

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=training)

    return [
        Layer(meta(n, k), meta(n) if bias else None, activation)
        for (k, n), activation in zip(itertools.pairwise(widths), activations)
    ]


OWN_STEPS = ("sum_partials", "cast", "split", "redo")  # kinds of steps that torch's own products do not have


@dataclass(frozen=True)
class RunPlan:
    """The plan for one run of a network: its children, the path, the reason, and the kernels.

    On the reference path, torch's own kernels run. The listed ones then only give a lower bound for the work.
    """

    children: str
    path: Literal["network", "layer", "reference"]
    reason: str
    kernels: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The plan for a batch, with the reasons. `str` is a table."""

    rows: int
    dtype: torch.dtype
    precision: str
    device: devices.Device | None  # None: not a GPU
    runs: tuple[RunPlan, ...]
    saved_bytes: int  # for backward
    workspace_bytes: int = 0  # the bytes that the largest pass on the kernels allocates while it runs

    @property
    def path(self) -> str:
        """ "network" or "layer", the path of the first run on kernels; "reference" if no run is on kernels."""
        return next((run.path for run in self.runs if run.path != "reference"), "reference")

    @property
    def reason(self) -> str:
        """The reasons of the runs on this path."""
        return "; ".join(dict.fromkeys(run.reason for run in self.runs if run.path == self.path))

    @property
    def work(self) -> Work:
        """FLOPs and bytes of all kernels, forward and backward."""
        return sum((kernel.work for run in self.runs for kernel in run.kernels), Work(0, 0))

    @property
    def floor(self) -> float | None:
        """The shortest time in seconds for all kernels one after another; None if the device's peaks are not known."""
        floors = [self._floor(run, kernel) for run in self.runs for kernel in run.kernels]
        return None if None in floors else sum(floor for floor in floors if floor is not None)

    def _floor(self, run: RunPlan, step: Step) -> float | None:
        tile = step.tile if run.path != "reference" else None
        precision = tile.precision if tile and tile.precision in devices.PRODUCTS_OF_PARTS else self.precision
        peak = self.device and self.device.peak(self.dtype, precision)
        return step.work.floor(peak, self.device.bandwidth) if peak and self.device and self.device.bandwidth else None

    def __str__(self) -> str:
        where = self.device.name if self.device else "no GPU"
        how = f" ({self.precision})" if self.dtype == torch.float32 else ""
        lines = [f"{count(self.rows, 'row')}, {dtype_name(self.dtype)}{how}, {where}"]
        header = ("layer", "kernel", "tile", "GFLOP", "MB", "floor", "chosen as")
        for run in self.runs:
            lines.append(f"{run.children}: {run.path}, because {run.reason}")
            if run.kernels:
                body = [self._row(run, kernel) for kernel in run.kernels]
                widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
                lines += [
                    "  "
                    + "  ".join(
                        cell.rjust(width) if 3 <= i < 6 else cell.ljust(width) for i, (cell, width) in row
                    ).rstrip()
                    for row in (list(enumerate(zip(row, widths))) for row in [header, *body])
                ]
        total = f"total {self.work.flops / 1e9:.3f} GFLOP, {self.work.bytes / 1e6:.3f} MB"
        if self.floor is not None:
            total += f", floor {_time(self.floor)}"
        return "\n".join([*lines, f"{total}; saved for backward {self.saved_bytes / 1e6:.3f} MB"])

    def _row(self, run: RunPlan, step: Step) -> tuple[str, ...]:
        on_kernels = run.path != "reference"
        shown = "torch's own"
        if step.tile is not None and on_kernels:
            rows = f"{step.tile.rows} rows, {step.tile.num_warps} warps, {step.tile.num_stages} stages"
            shown = rows if run.path == "network" else str(step.tile)
        floor = self._floor(run, step)
        return (
            step.label,
            step.kind,
            shown,
            f"{step.work.flops / 1e9:.3f}",
            f"{step.work.bytes / 1e6:.3f}",
            _time(floor) if floor is not None else "-",
            step.source if on_kernels else "",
        )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _saved_by_torch(children: Sequence[Any], flow: Tensor) -> tuple[Tensor, int]:
    """(output, bytes saved for backward without parameters) of children in plain torch, from a run on meta tensors."""
    saved: dict[int, Tensor] = {}
    own: dict[int, Tensor] = {}  # the tensors too: the id of a freed storage could become that of a saved one

    def pack(tensor: Tensor) -> Tensor:
        key = storage_id(tensor)
        if key not in own:
            saved[key] = tensor
        return tensor

    flow = flow.detach().requires_grad_(flow.requires_grad)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for child in _flat(children):
            if not isinstance(child, nn.Module):
                flow = child(flow)
                continue
            tensors = dict((*child.named_parameters(), *child.named_buffers()))
            state = {
                name: stand_in(tensor, "meta", flow.dtype if tensor.is_floating_point() else None)
                for name, tensor in tensors.items()
            }
            if is_loaded_instance(child, "torch.distributed.fsdp", "FSDPModule") or any(
                map(is_split, child.parameters())
            ):
                child = _unhooked(child)  # its hooks would wait for the other processes
            own.update(
                (storage_id(tensor), tensor)
                for name, tensor in state.items()
                if not is_linear(child) or tensor.dtype == tensors[name].dtype  # autocast saves a cast weight
            )
            try:
                flow = torch.func.functional_call(child, state, (flow,))
            except Exception as error:
                if WHY_NO_TRITON not in (None, NOT_INSTALLED):
                    # torch's meta kernels import Triton as well, and expect no error but ImportError.
                    raise RuntimeError(f"torch itself fails on {type(child).__name__}: {WHY_NO_TRITON}") from error
                if not isinstance(error, RuntimeError | TypeError):
                    raise
                raise ValueError(
                    f"{type(child).__name__} does not take an input of shape {tuple(flow.shape)} ({error}); "
                    "explain supports only networks whose input is rows of features"
                ) from None
    return flow, sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _unhooked(module: nn.Module) -> nn.Module:
    """A copy of a module, with the same parameters, without hooks."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for hooks in HOOKS:
        setattr(twin, hooks, OrderedDict())
    return twin


def _flat(children: Iterable[Any]) -> Iterator[Any]:
    """Yield the children. For a FusedLinear, yield its Linear and its activation."""
    for child in children:
        yield from child.parts if isinstance(child, LinearWithActivation) else (child,)


def checked_rows(batch_size: object, least: int) -> int:
    """`batch_size` as a Python int.

    Raises:
        ValueError: it is not a whole number, is below `least`, or is above 2^40.
    """
    rows = whole_number(batch_size)
    if rows is None or not least <= rows <= MOST_ROWS:
        raise ValueError(
            f"batch_size is {batch_size!r}; it needs to be a number of rows, {least} or more, at most 2^40"
        )
    return rows


def _torch_device(device: Any) -> torch.device:
    """The torch device that a user named.

    Raises:
        ValueError: torch has no device of this name, or cannot use a GPU here.
    """
    known = f"the name of a GPU to plan for ({listed(devices.DEVICES)}, or a short form such as h100)"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; it needs to be a torch device, such as cuda, or {known}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and torch can use none here; it needs to be cpu, or {known}")
    return where


@torch.enable_grad()  # the plan is for a training step
def explain(model: Any, batch_size: int, dtype: torch.dtype | None, device: Any) -> Plan:
    """The plan of a model for a batch of this size: see `FusedMLP.explain`."""
    rows = checked_rows(batch_size, least=0)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}; it needs to be a floating-point dtype, such as torch.bfloat16")
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("the network has no parameters; there is nothing to explain")
    known = devices.named_device(device) if isinstance(device, str) else None
    where = torch.device("meta") if known else parameter.device if device is None else _torch_device(device)
    given = policy_dtype(model) or parameter.dtype  # the dtype of a call's input
    dtype = dtype or compute_dtype(given, where.type)
    gpu = known
    if known is None and (where.type == "cuda" or model._wants_kernels()):
        gpu = devices.describe(where.type, where.index or 0)

    runs: list[RunPlan] = []
    saved = workspace = 0
    children = model._ordered_children()
    first = next((child for child in children if is_linear(child)), None)
    width = 1 if first is None else linear_weight(first).shape[1]
    flow = torch.empty((rows, width), dtype=dtype, device="meta")
    child_names = iter(model._ordered_names())
    for run in find_runs(children):
        names = ", ".join(f"{name} {module_name(child)}" for child, name in zip(run.children, child_names))
        needs_x = flow.requires_grad  # False for the network's input, mostly True for the input of a later run
        flow, saved_by_torch = _saved_by_torch(run.children, flow)
        if not run.linears:
            saved += saved_by_torch
            runs.append(RunPlan(names, "reference", run.reason or ""))
            continue
        layers = run.gathered_layers("meta", policy_dtype(model))
        input_dtype = dtype if runs or given.itemsize <= dtype.itemsize else given
        shape = (rows, layers[0].weight.shape[1])
        x = torch.empty(shape, dtype=input_dtype, device="meta", requires_grad=needs_x)
        reason = why_not(layers, dtype, where, model._backend, planned=known is not None)
        name, why, schedules, saved_by_kernels = _plan_layers(model, x, layers, dtype, gpu, reason)
        steps = tuple(step for schedule in schedules for step in schedule.steps)
        if name == "reference":
            saved += saved_by_torch
            steps = tuple(step for step in steps if step.kind not in OWN_STEPS)
        else:
            saved += saved_by_kernels
            workspace = max(workspace, *(schedule.workspace_bytes for schedule in schedules))
            cast = (_input_cast(x, dtype),) if name == "layer" and x.dtype != dtype else ()
            steps = (SEED,) * any(layer.dropout for layer in layers) + cast + steps
        runs.append(RunPlan(names, name, why, steps))
    return Plan(rows, dtype, dtype_precision(dtype), gpu, tuple(runs), saved, workspace)


def _input_cast(x: Tensor, dtype: torch.dtype) -> Step:
    """The cast of the input, which comes before the schedules of the layer path."""
    return Step("cast", "input", "input", {}, (), lambda: None, Work(0, x.numel() * (x.itemsize + dtype.itemsize)))


def _plan_layers(
    model: Any,
    x: Tensor,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    gpu: devices.Device | None,
    reason: str | None,
) -> tuple[Literal["reference", "network", "layer"], str, list[Schedule], int]:
    """(path, the reason for it, schedules, bytes saved for backward) of one run's layers.

    `reason` is the reason why they cannot run on kernels, or None. The schedules of plain torch are those of the layer
    path without Dropout, a lower bound of torch's work.
    """
    precision, training = dtype_precision(dtype), wants_gradients(x, layers)
    widths = layer_widths(x, layers)
    problem = (widths, [layer.activation for layer in layers], dtype, precision, training)
    torch_too = not model._wants_kernels()
    by_tables = model._recompute is None
    if reason is None and gpu is not None and by_tables and torch_too and measured_path(*problem, gpu) == "torch":
        reason = TORCH_IS_FASTER
    network: NetworkPath | str = ""
    if reason is None:
        network = find_network(x, layers, dtype, model._recompute, precision, training, torch_too, gpu)
    else:
        layers = tuple(layer._replace(dropout=0.0) for layer in layers)
    path: NetworkPath | LayerPath | str = network
    if isinstance(path, str):
        path = find_layers(x, layers, dtype, model._backend if reason is None else "triton", precision)
    schedules: list[Schedule] = []
    saved = 0
    if 0 not in widths:
        forwards, backwards, saved = make_schedules(path, x, layers, gpu or devices.INTERPRETED_DEVICE)
        schedules = [*forwards, *backwards]
    if reason is not None:
        return "reference", reason, schedules, saved
    assert gpu is not None
    note = ""
    if by_tables and measured_path(*problem, gpu) is None and measured_path(*problem, gpu, outdated=True):
        note = "; its measurement is not used, because the kernels have changed since"
    if isinstance(path, NetworkPath):
        return "network", path.explanation + note, schedules, saved
    return "layer", str(network) + note, schedules, saved
