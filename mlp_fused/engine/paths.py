"""Which path runs for a problem, and why; and what the work amounts to: FLOPs, bytes, the floor they give."""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..kernels import devices, layer_tiles, network_tiles, tile_config
from ..kernels.activation import Activation, parse
from ..kernels.activations import ACTIVATIONS
from ..kernels.dropout import SEED_BYTES, keeps_preactivation
from ..kernels.language import HAS_TRITON, INTERPRETER
from ..kernels.launch import Launches
from ..kernels.network import Gradients, Network, gradients_of, network_of
from ..kernels.tile_config import TileConfig
from . import tables
from .originals import constant_to_compilers
from .recognize import resolve

if TYPE_CHECKING:
    from ..functional import Layer

__all__ = [
    "Backend",
    "Formulation",
    "KernelPlan",
    "NetworkPlan",
    "Plan",
    "RunPlan",
    "Work",
    "check_backend",
    "check_recompute",
    "compute_dtype",
    "float32_precision",
    "forget_tables",
    "is_watched",
    "kept_elements",
    "log_once",
    "network_path",
    "plan_layers",
    "plan_network",
    "wants_gradients",
    "why_device",
    "why_not",
    "why_reference",
    "why_torch",
    "work",
]

Backend = Literal["auto", "triton", "reference"]

# How the network path trains. recompute: one backward kernel runs the forward again. stored: the forward keeps one
# tensor of each hidden layer. replay: x alone is kept, and backward begins with the forward that stores.
Formulation = Literal["recompute", "stored", "replay"]

logger = logging.getLogger("mlp_fused")

IDENTITY = ACTIVATIONS["identity"]
AS_MEASURED = "faster as measured on this device"
SLOW_NETWORK = "one kernel for a float32 network was slower than torch where measured"
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
OLDEST_CAPABILITY = 80  # compute capability 8.0, the oldest that the kernels are compiled and tested for


def check_backend(backend: object, argument: str = "backend") -> Backend:
    """`backend`, if it is one.

    Raises:
        ValueError: it is not "auto", "triton" or "reference".
    """
    for known in get_args(Backend):
        if backend == known:
            return known
    raise ValueError(f"{argument} is {backend!r}; it needs to be one of: {', '.join(get_args(Backend))}")


def check_recompute(recompute: object) -> bool | None:
    """`recompute`, if it is True, False or None.

    Raises:
        TypeError: it is something else.
    """
    if recompute is None or isinstance(recompute, bool):
        return recompute
    raise TypeError(f"recompute is {recompute!r}; it needs to be True, False or None")


# Synchronise and check after every kernel. Both are read once, as a call has no microsecond to spare for them.
DEBUG = os.environ.get("MLP_FUSED_DEBUG", "0") == "1"
# What "auto" means in this process.
DEFAULT_BACKEND: Backend = check_backend(os.environ.get("MLP_FUSED_BACKEND", "auto"), "MLP_FUSED_BACKEND")


def compute_dtype(dtype: torch.dtype, kind: str) -> torch.dtype:
    """What products of `dtype` are computed in on a kind of device: autocast's dtype where it is on, as nn.Linear."""
    known = kind in ("cuda", "cpu") or torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind) and dtype.is_floating_point and dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return dtype


def float32_precision() -> str:
    """How fp32 is multiplied, "tf32" or "ieee": torch's own setting, whichever of its switches was used."""
    return "tf32" if torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32" else "ieee"


constant_to_compilers(float32_precision)  # they compile anew where the setting is another


def _why_device_cannot(kind: str, index: int) -> str | None:
    return _why_device_of_index_cannot(kind, index)


constant_to_compilers(_why_device_cannot)  # they would look through a cache, and into the driver


@functools.lru_cache(maxsize=64)
def _why_device_of_index_cannot(kind: str, index: int) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if kind != "cuda":
        return f"the kernels do not run on {kind} devices"
    if INTERPRETER:
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU"
    device = devices.describe(kind, index)
    if isinstance(device.arch, int) and device.arch < OLDEST_CAPABILITY:
        return f"{device.name} has compute capability {device.arch / 10}; the kernels need 8.0"
    return None


def why_reference(
    x: Tensor,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    backend: Backend,
    recompute: bool | None = None,
    changed: str | None = None,
) -> str | None:
    """Why these layers run as plain torch; None where the kernels take them.

    Args:
        x: the input, checked already.
        dtype: what the products are computed in (autocast's where it is on).
        backend: the user's wish; "auto" is MLP_FUSED_BACKEND's where that is set.
        recompute: the user's wish.
        changed: the reason why the functions that the kernels stand for are not torch's own, if they are not.

    Raises:
        RuntimeError: the backend is "triton" and the kernels cannot run.
    """
    if backend == "auto":
        backend = DEFAULT_BACKEND
    if backend == "reference":
        reason: str | None = 'the backend is "reference"'
    else:
        reason = changed or _why_call_cannot(x, layers, dtype, backend)
    if reason is None and backend == "auto" and recompute is None:
        reason = _why_torch_here(
            x.device.type,
            x.device.index or 0,
            tuple(map(operator.index, (x.shape[-1], *(weight.shape[0] for weight, *_ in layers)))),  # no symbols
            tuple(layer.activation.spec for layer in layers),
            dtype,
            float32_precision() if dtype == torch.float32 else "ieee",
            wants_gradients(x, layers),
        )
    if reason is not None:
        if backend == "triton":
            raise RuntimeError(f'backend is "triton", but {reason}; or use backend="auto"')
        if x.is_cuda and not torch.compiler.is_compiling():
            log_once(reason)
    return reason


def why_not(
    layers: Sequence[Layer], dtype: torch.dtype, device: torch.device, backend: Backend, planned: bool
) -> str | None:
    """Why layers would not run on the kernels, as far as it can be told without an input; None where they would.

    `planned`: the device is one that is only thought of.
    """
    if backend == "auto":
        backend = DEFAULT_BACKEND
    if backend == "reference":
        return 'the backend is "reference"'
    return (None if planned else why_device(device, backend)) or _why_layers(layers, dtype, device)


def wants_gradients(x: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether anything is kept for a backward: gradients are recorded, and of the input or some parameter."""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or any(weight.requires_grad or (bias is not None and bias.requires_grad) for weight, bias, *_ in layers)
    )


def why_torch(
    widths: tuple[int, ...],
    activations: Sequence[Activation],
    dtype: torch.dtype,
    precision: str,
    training: bool,
    recompute: bool | None,
    device: devices.Device,
) -> str | None:
    """Why a network that kernels could take runs as plain torch all the same: it was measured; None where it was not.

    What was measured holds where the user leaves both the backend and `recompute` open. It does not depend on the rows
    of a batch (see `network_path`).
    """
    if recompute is not None:
        return None
    path = _measured_path(widths, activations, dtype, precision, training, device)
    return f"torch is {AS_MEASURED}" if path == "torch" else None


def _why_torch_here(
    kind: str,
    index: int,
    widths: tuple[int, ...],
    activations: tuple[str, ...],
    dtype: torch.dtype,
    precision: str,
    training: bool,
) -> str | None:
    """`why_torch` of a device of torch's, by values that a compiler takes as constants."""
    if not _has_measured_networks(kind, index):
        return None
    of_specs = tuple(map(parse, activations))
    return why_torch(widths, of_specs, dtype, precision, training, None, devices.describe(kind, index))


constant_to_compilers(_why_torch_here)


@functools.lru_cache(maxsize=64)
def _has_measured_networks(kind: str, index: int) -> bool:
    """Whether a device's tables have networks at all: where they have none, a call has no microseconds to spare."""
    return any(table.networks for table in tables.measured(devices.describe(kind, index)))


def _measured_path(
    widths: tuple[int, ...],
    activations: Sequence[Activation],
    dtype: torch.dtype,
    precision: str,
    training: bool,
    device: devices.Device,
) -> str | None:
    """What was fastest as measured. A row is of one activation after every hidden layer, whatever the output's."""
    names = {activation.name for activation in activations[:-1] or activations}
    if len(names) > 1:
        return None
    return tables.path_for(widths, None, dtype, precision, names.pop(), training, device)


def forget_tables() -> None:
    """Decide by the measured tables as they are on disk now: for after one was written.

    A model that has run already goes on as it did, until something else about its calls changes.
    """
    tables.forget()
    _has_measured_networks.cache_clear()
    network_path.cache_clear()


def is_watched() -> bool:
    """Whether a call is traced by a compiler, or seen by a dispatch mode: it is one of registered operators then."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _why_call_cannot(x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, backend: Backend) -> str | None:
    if torch.jit.is_tracing():
        return "the call is being traced by torch.jit"
    reason = why_device(x.device, backend)
    if reason is not None:
        return reason
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if x.layout != torch.strided:
        return f"the input's layout is {x.layout}; the kernels need a dense tensor (x.to_dense())"
    if not _is_plain(x):
        return f"the input is of the subclass {type(x).__name__}"
    return _why_layers(layers, dtype, x.device)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is torch's own; while a compiler or a mode watches, one of those that stand in for them."""
    kind = type(tensor)
    return kind in (Tensor, nn.Parameter) or (is_watched() and kind.__name__ in STAND_INS)


STAND_INS = ("FakeTensor", "FunctionalTensor")


def why_device(device: torch.device, backend: Backend) -> str | None:
    """Why no kernel runs there."""
    if device.type != "cpu":
        return _why_device_cannot(device.type, device.index or 0)
    if (DEFAULT_BACKEND if backend == "auto" else backend) != "triton":
        return "the input is on the CPU"
    if not HAS_TRITON:
        return "Triton is not installed"
    if not INTERPRETER:
        return (
            "the input is on the CPU, where kernels run only in Triton's interpreter; set TRITON_INTERPRET=1 "
            "before importing mlp_fused, or move the model and its input to a GPU"
        )
    return None


def _why_layers(layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> str | None:
    interpreted = device.type == "cpu"  # the interpreter computes in float64 as well
    if dtype not in KERNEL_DTYPES and not (interpreted and dtype == torch.float64):
        return f"the dtype is {dtype}; the kernels compute in float16, bfloat16 and float32"
    for weight, bias, *_ in layers:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not _is_plain(tensor):
                return f"a {name} is of the subclass {type(tensor).__name__}"
        if 0 in weight.shape:
            return "a width is zero"
        if torch.compiler.is_compiling():
            continue  # the operator makes tensors plain itself
        if weight.is_neg() or (bias is not None and bias.is_neg()):
            return "a parameter is negated lazily (resolve_neg() makes it plain)"
    return None


@functools.cache
def log_once(reason: str) -> None:
    """Log a reason for which plain torch runs, the first time that it is one."""
    logger.info("plain torch runs instead of the kernels: %s", reason)


@dataclass(frozen=True, eq=False)
class NetworkPlan:
    """The network path for some layers on a device: its tiles, and how it trains, with the reason."""

    network: Network
    forward: TileConfig
    formulation: Formulation | None  # None: for inference only
    reason: str
    backward: TileConfig | None  # of the kernel that recomputes, or of the chain of dz
    wgrad: TileConfig
    launches: Launches = field(default_factory=Launches, repr=False)  # that were made

    def kept_elements(self, rows: int) -> int:
        """How many elements are kept for backward."""
        if self.formulation is None:
            return 0
        net = self.network
        if self.formulation != "stored":
            return rows * net.widths[0]
        return rows * (net.widths[0] + net.starts[-1] + net.activates_output * net.widths[-1])

    def kept_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """Of what a forward stores besides x and y, all of the network's dtype."""
        net = self.network
        if self.formulation != "stored":
            return []
        hidden = [(rows * net.starts[-1],)] if net.layers > 1 else []
        return hidden + ([(rows, net.widths[-1])] if net.keeps_z[-1] else [])

    @property
    def explanation(self) -> str:
        """Why the network path, and why this formulation."""
        how = {
            "recompute": "backward recomputes the forward in one pass: ",
            "stored": "the forward stores one tensor a hidden layer: ",
            "replay": "backward begins with the forward again: ",
        }
        trains = f"; {how[self.formulation]}{self.reason}" if self.formulation else ""
        return f"the weights fit on the chip{trains}"


@functools.lru_cache(maxsize=1024)
def network_path(
    widths: tuple[int, ...],
    strides: tuple[tuple[int, int, int], ...],
    activations: tuple[Activation, ...],
    dtype: torch.dtype,
    precision: str,
    device: devices.Device,
    training: bool,
    recompute: bool | None = None,
    input_size: int = 0,
    drops: bool = False,
    torch_too: bool = False,
) -> NetworkPlan | str:
    """The network path for these layers, or the reason why they take the layer path.

    The rule for training: where one pass over a tile fits in registers (`configs.network_tile`), the backward
    recomputes, as storing moves five more tensors of each hidden layer (written; read for dz and for dW; dz written and
    read). A measured table overrules it, and the user overrules both. The choice does not depend on the rows of a
    batch, so that batches of every size take one path: it is that of the largest batch measured.

    Args:
        widths: of the input to the output.
        strides: of each layer: the weight's two and the bias's.
        recompute: the user's wish: True keeps x alone, False keeps a tensor of each hidden layer, None leaves it open.
        input_size: bytes of an element of the input, where it is wider than `dtype`'s (under autocast).
        drops: whether Dropout that drops follows a layer.
        torch_too: whether the network is left to the layer path, which may run torch's products, where that is faster.
    """
    if DEBUG:
        return "MLP_FUSED_DEBUG=1 checks layer by layer"
    if drops:
        return "Dropout is fused layer by layer"
    network = network_of(widths, strides, activations, dtype, precision)

    def tile(kind: network_tiles.NetworkKind) -> TileConfig | str:
        problem = network_tiles.NetworkProblem(kind, network.pads, network.keeps_z, dtype, precision, input_size)
        return network_tiles.network_tile(problem, device)

    forward = tile("forward")
    if isinstance(forward, str):
        return forward
    wgrad = network_tiles.network_wgrad_tile(dtype, precision, device)
    measured = None
    if recompute is None:
        measured = _measured_path(widths, activations, dtype, precision, training, device)
    if measured == "layer":
        return f"it is {AS_MEASURED}"
    if torch_too and recompute is None and measured is None and dtype == torch.float32:
        return SLOW_NETWORK
    if not training:
        return NetworkPlan(network, forward, None, "inference keeps nothing", None, wgrad)

    one_pass, chain = tile("recompute"), tile("dgrad")
    size = dtype.itemsize
    ends = 2 * widths[0] + 2 * widths[-1]
    moved = f"{size * ends} bytes a row, storing {size * (ends + 5 * sum(widths[1:-1]))}"
    if not isinstance(one_pass, str) and recompute is not False and (recompute or measured != "stored"):
        reason = "the user asks for it" if recompute else f"one pass fits in registers and moves {moved}"
        return NetworkPlan(network, forward, "recompute", reason, one_pass, wgrad)
    if isinstance(chain, str):
        return f"its backward does not fit: {chain}"
    if recompute:
        return NetworkPlan(network, forward, "replay", "the user asks for it", chain, wgrad)
    if recompute is False:
        reason = "the user asks for it"
    else:
        reason = one_pass if isinstance(one_pass, str) else f"it is {AS_MEASURED}"
    return NetworkPlan(network, forward, "stored", reason, chain, wgrad)


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
        lines = [f"{self.rows} rows, {str(self.dtype).removeprefix('torch.')}{how}, {where}"]
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
