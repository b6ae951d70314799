"""The plan for a batch: paths and their reasons, kernels, tiles, FLOPs, bytes, and the floor they give."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .dtypes import dtype_name
from .engine import tables
from .engine.network_path import NetworkPlan
from .engine.paths import network_path, why_not, why_torch
from .engine.recognize import resolve
from .engine.runs import (
    LinearWithActivation,
    is_linear,
    is_split,
    linear_weight,
    name_of,
    runs_of,
    stand_in,
)
from .engine.settings import HOOKS, compute_dtype, float32_precision, is_loaded_instance, policy_dtype, storage_id
from .errors import count, listed, whole_number
from .kernels import devices, layer_tiles, tile_config
from .kernels.activation import Activation
from .kernels.activations import IDENTITY
from .kernels.dropout import SEED_BYTES, keeps_preactivation
from .kernels.language import NOT_INSTALLED, WHY_NO_TRITON
from .kernels.network import Gradients, gradients_of
from .kernels.tile_config import TileConfig
from .reference import Layer

__all__ = [
    "KernelPlan",
    "Plan",
    "RunPlan",
    "Work",
    "checked_rows",
    "explain",
    "kept_elements",
    "plan_layers",
    "plan_network",
    "work",
]


@dataclass(frozen=True)
class Work:
    """FLOPs (a multiply-add is two) and bytes read from and written to the device's memory."""

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least seconds that it can take: max(FLOPs / peak, bytes / bandwidth)."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class KernelPlan:
    """One launch: what it computes, and what work that is; with its tile, or the problem that one is chosen for."""

    layer: str
    kind: str
    work: Work
    problem: tile_config.Problem | None = None
    tile: TileConfig | None = None

    @property
    def is_backward(self) -> bool:
        return self.kind not in ("seed", "forward", "network forward")


def plan_layers(
    rows: int,
    shapes: Sequence[tuple[int, int]],
    activations: Sequence[Activation],
    dtype: torch.dtype,
    *,
    biases: Sequence[bool],
    trainable: Sequence[bool] | None = None,
    needs_input_grad: bool = False,
    precision: str = "ieee",
    dropouts: Sequence[float] | None = None,
) -> list[KernelPlan]:
    """The launches of the layer path, forward and backward, in their order, each with its FLOPs and bytes.

    A kernel's bytes are its operands read once and its outputs written once, as they are when a tile's operands stay in
    cache; a weight gradient split over rows writes and reads its partial sums besides.

    Args:
        shapes: (width in, width out) of each layer.
        biases: whether each layer has one.
        trainable: whether each layer's parameters need gradients, all by default; none at all for inference.
        dropouts: the probability of the Dropout after each layer, all 0 by default.
    """
    dropouts = [0.0] * len(shapes) if dropouts is None else dropouts
    # Whether the pre-activation is kept of each layer, and of the input, which has none.
    keeps_z = [*(keeps_preactivation(*pair) for pair in zip(activations, dropouts)), False]
    trainable = [True] * len(shapes) if trainable is None else trainable
    # Whether anything below a layer needs a gradient, from the input to the output.
    below_needs = [needs_input_grad or any(trainable[:index]) for index in range(len(shapes) + 1)]
    forward: list[KernelPlan] = []
    backward: list[list[KernelPlan]] = []
    if any(dropouts):
        forward.append(KernelPlan("all", "seed", Work(0, SEED_BYTES)))
    for index, ((k, n), activation, bias) in enumerate(zip(shapes, activations, biases)):
        weights = n * k + n * bias

        def plan(
            kind: tile_config.Kind,
            flops: int,
            elements: int,
            m: int,
            n: int,
            k: int,
            epilogue: Activation = IDENTITY,
            layer: str = f"{index}: {k} -> {n}",
            aligned: bool = tile_config.is_aligned(k, n, dtype),
        ) -> KernelPlan:
            problem = tile_config.Problem(kind, m, n, k, dtype, precision, aligned, epilogue.name)
            return KernelPlan(layer, kind, Work(flops, elements * dtype.itemsize), problem)

        product = 2 * rows * n * k
        outputs = 1 + (below_needs[index + 1] and keeps_z[index])  # h; z
        forward.append(plan("forward", product, rows * k + weights + outputs * rows * n, rows, n, k, activation))
        steps = []
        activates = activation.name != "identity"
        if index + 1 == len(shapes) and (activates or dropouts[index]) and below_needs[index + 1]:
            steps.append(plan("output_gradient", 0, (2 + activates) * rows * n, rows, n, 0))  # dy, dz; what was saved
        if below_needs[index]:
            below = activations[index - 1] if index else IDENTITY
            # dx; what was saved; h again
            tensors = 1 + (below.name != "identity") + (trainable[index] and keeps_z[index - 1])
            steps.append(plan("dgrad", product, rows * n + n * k + tensors * rows * k, rows, k, n, below))
        if trainable[index]:
            steps.append(plan("wgrad", product, rows * n + rows * k + weights, n, k, rows))
        backward.append(steps)
    return forward + [kernel for steps in reversed(backward) for kernel in steps]


def plan_network(
    rows: int, path: NetworkPlan, biases: Sequence[bool], gradients: Gradients, needs_input_grad: bool = False
) -> list[KernelPlan]:
    """The launches of the network path, forward and backward, as `plan_layers` counts them.

    Partial sums of weight gradients, and their addition, are not counted: they do not grow with the rows.

    Args:
        biases: whether each layer has one.
        gradients: those of the parameters that are wanted.
    """
    network, last = path.network, path.network.layers - 1
    widths = network.widths
    products = [2 * rows * n * k for k, n in itertools.pairwise(widths)]
    parameters = sum(n * k + n * bias for k, n, bias in zip(widths, widths[1:], biases))
    hidden = rows * sum(widths[1:-1])
    ends = rows * (widths[0] + widths[-1])
    dx = rows * widths[0] * needs_input_grad
    wanted = any(gradients.weights) or any(gradients.biases)
    names = f"0-{last}: " + " -> ".join(map(str, widths))

    def kernel(kind: str, flops: int, elements: int, tile: TileConfig | None) -> KernelPlan:
        return KernelPlan(names, kind, Work(flops, elements * network.dtype.itemsize), tile=tile)

    # What is kept of the last layer: its z where it has one to keep, else y.
    own = rows * widths[-1] * network.activates_output
    kept = hidden + own * network.keeps_z[-1]
    training = path.formulation is not None and (wanted or needs_input_grad)
    stores = training and path.formulation == "stored"
    kernels = [kernel("network forward", sum(products), ends + parameters + kept * stores, path.forward)]
    if not training:
        return kernels
    chain = sum(products[gradients.lowest + 1 :]) + products[0] * needs_input_grad
    sums = sum(product for product, weight in zip(products, gradients.weights) if weight)
    if path.formulation == "recompute":
        again = sum(products[: last + network.activates_output])
        elements = ends + dx + parameters + gradients.starts[-1]
        return [*kernels, kernel("network recompute", again + chain + sums, elements, path.backward)]
    if path.formulation == "replay":
        kernels.append(kernel("network again", sum(products), ends + parameters + kept, path.forward))
    if chain or own:
        # dy and what was kept are read, every dz written, the last layer's where it is not dy
        elements = rows * widths[-1] + hidden + own + hidden + own + dx + parameters
        kernels.append(kernel("network dgrad", chain, elements, path.backward))
    if wanted:
        elements = ends + 2 * hidden + gradients.starts[-1]
        kernels.append(kernel("network wgrad", sums, elements, path.wgrad))
    return kernels


def kept_elements(rows: int, layers: Sequence[Layer], trainable: Sequence[bool], needs_input_grad: bool = False) -> int:
    """How many elements the layer path keeps for backward: one tensor a layer whose gradients need it."""
    kept = 0
    for index, (weight, _, activation, _) in enumerate(layers):
        below_needs = needs_input_grad or any(trainable[:index])
        has_below = index > 0 and layers[index - 1].activation.name != "identity"
        if trainable[index] or (below_needs and has_below):
            kept += rows * weight.shape[1]
        if index + 1 == len(layers) and activation.name != "identity" and (below_needs or trainable[index]):
            kept += rows * weight.shape[0]
    return kept


def work(
    rows: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    activation: str | Activation = "relu",
    output_activation: str | Activation = "identity",
    *,
    bias: bool = True,
    needs_input_grad: bool = False,
    device: devices.Device | None = None,
    precision: str = "ieee",
) -> dict[str, Work]:
    """The work of a network on the path it takes: {"inference": ..., "forward": ..., "backward": ...}.

    "forward" is that of training, which also keeps what backward needs. `widths` are in -> hidden ... -> out. Without a
    device, it is the layer path's.
    """
    shapes = list(itertools.pairwise(widths))
    activations = [resolve(activation)] * (len(shapes) - 1) + [resolve(output_activation)]

    def total(training: bool, backward: bool) -> Work:
        path = None
        if device is not None:
            strides = tuple((k, 1, int(bias)) for k, _ in shapes)
            path = network_path(
                tuple(widths), strides, tuple(activations), dtype, precision, device, training, torch_too=True
            )
        if isinstance(path, NetworkPlan):
            wanted = (training,) * len(shapes)
            biased = (training and bias,) * len(shapes)
            gradients = gradients_of(tuple(widths), wanted, biased, training and needs_input_grad)
            kernels = plan_network(rows, path, [bias] * len(shapes), gradients, training and needs_input_grad)
            return sum((kernel.work for kernel in kernels if kernel.is_backward == backward), Work(0, 0))
        kernels = plan_layers(
            rows,
            shapes,
            activations,
            dtype,
            biases=[bias] * len(shapes),
            trainable=[training] * len(shapes),
            needs_input_grad=training and needs_input_grad,
        )
        return sum((kernel.work for kernel in kernels if kernel.is_backward == backward), Work(0, 0))

    return {"inference": total(False, False), "forward": total(True, False), "backward": total(True, True)}


@dataclass(frozen=True)
class RunPlan:
    """What runs for some neighbouring children of a network: the path, the reason, and their kernels.

    On the reference path the kernels are torch's own; the ones listed say what the work is at the least.
    """

    children: str
    path: Literal["network", "layer", "reference"]
    reason: str
    kernels: tuple[KernelPlan, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What would run for a batch, and why. `str` is a table."""

    rows: int
    dtype: torch.dtype
    precision: str
    device: devices.Device | None  # None: not a GPU
    runs: tuple[RunPlan, ...]
    kept_bytes: int
    torch_too: bool = True  # whether a product is left to torch where that was faster as measured

    @property
    def path(self) -> str:
        """ "network" or "layer", the first run's on kernels; "reference" where there is none."""
        return next((run.path for run in self.runs if run.path != "reference"), "reference")

    @property
    def reason(self) -> str:
        """Why that path: the reasons of its runs."""
        return "; ".join(dict.fromkeys(run.reason for run in self.runs if run.path == self.path))

    @property
    def work(self) -> Work:
        """FLOPs and bytes of all kernels, forward and backward."""
        return sum((kernel.work for run in self.runs for kernel in run.kernels), Work(0, 0))

    @property
    def floor(self) -> float | None:
        """The least seconds for all kernels one after another on this device; None where its peaks are not known."""
        floors = [self._floor(run, kernel) for run in self.runs for kernel in run.kernels]
        return None if None in floors else sum(floor for floor in floors if floor is not None)

    def choice(self, run: RunPlan, kernel: KernelPlan) -> tables.Choice:
        """The tile that a kernel runs with, or torch's product where there is none; and where that comes from."""
        if self.device is None or run.path == "reference":
            return tables.Choice(None, "")
        if kernel.problem is None:
            return tables.Choice(kernel.tile, "")
        if kernel.problem.kind == "output_gradient":
            return tables.Choice(layer_tiles.choose(kernel.problem, self.device), "")
        choice = tables.choice_for(kernel.problem, self.device)
        if choice.tile is None and not self.torch_too:
            return tables.Choice(layer_tiles.choose(kernel.problem, self.device), "asked for")
        return choice

    def _floor(self, run: RunPlan, kernel: KernelPlan) -> float | None:
        tile = self.choice(run, kernel).tile
        precision = "bf16x6" if tile and tile.precision == "bf16x6" else self.precision
        peak = self.device and self.device.peak(self.dtype, precision)
        return (
            kernel.work.floor(peak, self.device.bandwidth) if peak and self.device and self.device.bandwidth else None
        )

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
        return "\n".join([*lines, f"{total}; kept for backward {self.kept_bytes / 1e6:.3f} MB"])

    def _row(self, run: RunPlan, kernel: KernelPlan) -> tuple[str, ...]:
        choice = self.choice(run, kernel)
        tile, shown = choice.tile, "torch's own"
        if tile is not None:
            rows = f"{tile.rows} rows, {tile.num_warps} warps, {tile.num_stages} stages"
            shown = str(tile) if kernel.problem is not None else rows
        floor = self._floor(run, kernel)
        return (
            kernel.layer,
            kernel.kind,
            shown,
            f"{kernel.work.flops / 1e9:.3f}",
            f"{kernel.work.bytes / 1e6:.3f}",
            _time(floor) if floor is not None else "-",
            choice.source,
        )


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _kept_by_torch(children: Sequence[Any], flow: Tensor) -> tuple[Tensor, int]:
    """What plain torch keeps for backward, bytes: read off a run of the children on meta tensors, parameters apart."""
    kept: dict[int, Tensor] = {}
    own: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        key = storage_id(tensor)
        if key not in own:
            kept[key] = tensor
        return tensor

    flow = flow.detach().requires_grad_(flow.requires_grad)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for child in _flat(children):
            if not isinstance(child, nn.Module):
                flow = child(flow)
                continue
            state = {
                name: stand_in(tensor, "meta", flow.dtype if tensor.is_floating_point() else None)
                for name, tensor in (*child.named_parameters(), *child.named_buffers())
            }
            if is_loaded_instance(child, "torch.distributed.fsdp", "FSDPModule") or any(
                map(is_split, child.parameters())
            ):
                child = _unhooked(child)  # its hooks would wait for the other processes
            own.update(map(storage_id, state.values()))
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
                    "explain knows networks over rows of features"
                ) from None
    return flow, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _unhooked(module: nn.Module) -> nn.Module:
    """The same module without hooks."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for hooks in HOOKS:
        setattr(twin, hooks, OrderedDict())
    return twin


def _flat(children: Iterable[Any]) -> Iterator[Any]:
    """The children, with a FusedLinear's Linear and activation in its place."""
    for child in children:
        yield from child.parts if isinstance(child, LinearWithActivation) else (child,)


def _widths(layers: Sequence[Layer]) -> tuple[int, ...]:
    """Of the input to the output; empty where there is no layer."""
    return tuple(layer.weight.shape[1] for layer in layers[:1]) + tuple(layer.weight.shape[0] for layer in layers)


def checked_rows(batch_size: object, least: int) -> int:
    """`batch_size` as a Python int.

    Raises:
        ValueError: it is no whole number, or below `least`.
    """
    rows = whole_number(batch_size)
    if rows is None or rows < least:
        raise ValueError(f"batch_size is {batch_size!r}; it needs to be a number of rows, {least} or more")
    return rows


def _torch_device(device: Any) -> torch.device:
    """The torch device that a user named.

    Raises:
        ValueError: torch has none of that name, or no GPU here.
    """
    known = f"the name of a GPU to plan for ({listed(devices.DEVICES)}, or a short form such as h100)"
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; it needs to be a torch device, such as cuda, or {known}") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and torch can use none here; it needs to be cpu, or {known}")
    return where


def explain(model: Any, batch_size: int, dtype: torch.dtype | None, device: Any) -> Plan:
    """The plan of a model for a batch of that many rows: see `FusedMLP.explain`."""
    rows = checked_rows(batch_size, least=0)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("the network has no parameters; there is nothing to explain")
    known = devices.named_device(device) if isinstance(device, str) else None
    where = torch.device("meta") if known else parameter.device if device is None else _torch_device(device)
    given = policy_dtype(model) or parameter.dtype  # to a call
    dtype = dtype or compute_dtype(given, where.type)
    precision = float32_precision() if dtype == torch.float32 else "ieee"
    gpu = known
    if known is None and (where.type == "cuda" or model._wants_kernels()):
        gpu = devices.describe(where.type, where.index or 0)

    runs: list[RunPlan] = []
    kept = 0
    links = model._links()
    first = next((child for child in links if is_linear(child)), None)
    width = 1 if first is None else linear_weight(first).shape[1]
    flow = torch.empty((rows, width), dtype=dtype, device="meta")
    link_names = iter(model._link_names())
    for run in runs_of(links):
        names = ", ".join(f"{name} {name_of(child)}" for child, name in zip(run.children, link_names))
        layers = run.gathered_layers("meta", policy_dtype(model))
        reason = run.reason
        if layers:
            reason = why_not(layers, dtype, where, model._backend, planned=known is not None)
        trainable = [layer.weight.requires_grad for layer in layers]
        biased = [layer.bias is not None and layer.bias.requires_grad for layer in layers]
        needs_input_grad = flow.requires_grad  # of the input itself never; of an inner run's mostly
        input_size = dtype.itemsize if runs else max(dtype.itemsize, given.itemsize)
        flow, kept_by_torch = _kept_by_torch(run.children, flow)
        widths, biases = _widths(layers), [layer.bias is not None for layer in layers]
        training = any(trainable) or any(biased) or needs_input_grad
        if layers and reason is None and gpu is not None and not model._wants_kernels():
            activations = [layer.activation for layer in layers]
            reason = why_torch(widths, activations, dtype, precision, training, model._recompute, gpu)
        path: NetworkPlan | str = ""
        if layers and reason is None:
            assert gpu is not None
            path = network_path(
                widths,
                tuple((*w.stride(), 0 if b is None else b.stride(0)) for w, b, *_ in layers),
                tuple(layer.activation for layer in layers),
                dtype,
                precision,
                gpu,
                training,
                model._recompute,
                input_size if input_size > dtype.itemsize else 0,
                drops=any(run.dropouts),
                torch_too=not model._wants_kernels(),
            )
        if isinstance(path, NetworkPlan):
            gradients = gradients_of(widths, tuple(trainable), tuple(biased), needs_input_grad)
            kernels = plan_network(rows, path, biases, gradients, needs_input_grad)
            kept += path.kept_elements(rows) * dtype.itemsize
            if path.formulation is not None:  # the input is kept as it is given
                kept += rows * widths[0] * (input_size - dtype.itemsize)
            runs.append(RunPlan(names, "network", path.explanation, tuple(kernels)))
            continue
        kernels = plan_layers(  # of the reference too: the least that the work takes
            rows,
            list(itertools.pairwise(widths)),
            [layer.activation for layer in layers],
            dtype,
            biases=biases,
            trainable=[weight or bias for weight, bias in zip(trainable, biased)],
            needs_input_grad=needs_input_grad,
            precision=precision,
            dropouts=run.dropouts if reason is None else None,
        )
        if reason is None:
            kept += kept_elements(rows, layers, trainable, needs_input_grad) * dtype.itemsize
            kept += SEED_BYTES if training and any(run.dropouts) else 0
            runs.append(RunPlan(names, "layer", str(path), tuple(kernels)))
        else:
            kept += kept_by_torch
            runs.append(RunPlan(names, "reference", reason, tuple(kernels)))
    return Plan(rows, dtype, precision, gpu, tuple(runs), kept, torch_too=not model._wants_kernels())
