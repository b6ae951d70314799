"""The path that runs for a problem, and the reason."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..dtypes import DTYPES
from ..kernels import devices, network_tiles
from ..kernels.activation import Activation, parse
from ..kernels.language import INTERPRETER, WHY_NO_TRITON
from ..kernels.network import network_of
from ..kernels.tile_config import TileConfig
from . import table_files, tables
from .layer_path import LayerPath, layer_path
from .layer_steps import Parameters, parameters_of
from .network_path import NetworkPath
from .settings import (
    DEBUG,
    DEFAULT_BACKEND,
    Backend,
    constant_to_compilers,
    float32_precision,
    forward_mode_level,
    is_exporting_to_onnx,
    is_tracing,
    is_transformed,
    is_watched,
    is_zero_tensor,
)

if TYPE_CHECKING:
    from ..reference import Layer

__all__ = [
    "forget_tables",
    "log_once",
    "network_path",
    "wants_gradients",
    "why_device",
    "why_not",
    "why_reference",
    "why_torch",
]


logger = logging.getLogger("mlp_fused")

AS_MEASURED = "faster as measured on this device"
SLOW_NETWORK = "one kernel for a float32 network was slower than torch where measured"
OLDEST_CAPABILITY = 80  # compute capability 8.0, the oldest that the kernels are compiled and tested for


def _why_device_cannot(kind: str, index: int) -> str | None:
    return _why_device_of_index_cannot(kind, index)


constant_to_compilers(_why_device_cannot)  # they would look through a cache, and into the driver


@functools.lru_cache(maxsize=64)
def _why_device_of_index_cannot(kind: str, index: int) -> str | None:
    if WHY_NO_TRITON is not None:
        return WHY_NO_TRITON
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
    """The reason for which these layers run as plain torch; None where the kernels take them.

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
    """The reason for which layers would not run on kernels, as far as it shows without an input, or None.

    `planned`: the device is one that is only thought of.
    """
    if backend == "auto":
        backend = DEFAULT_BACKEND
    if backend == "reference":
        return 'the backend is "reference"'
    return (None if planned else why_device(device, backend)) or _why_layers(layers, dtype, device)


def wants_gradients(x: Tensor, layers: Sequence[Layer]) -> bool:
    """True if a backward follows: gradients are recorded, and wanted for the input or some parameter."""
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
    """The reason to run a network in plain torch that kernels could take: torch was faster; None where it was not.

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
    """True if a device's tables have networks at all: where they have none, a call has no microseconds to spare."""
    return any(table.networks for table in tables.measured(devices.describe(kind, index)))


def _measured_path(
    widths: tuple[int, ...],
    activations: Sequence[Activation],
    dtype: torch.dtype,
    precision: str,
    training: bool,
    device: devices.Device,
) -> str | None:
    """The path that was fastest as measured. A row has one activation after hidden layers, and any at the output."""
    names = {activation.name for activation in activations[:-1] or activations}
    if len(names) > 1:
        return None
    return tables.path_for(widths, None, dtype, precision, names.pop(), training, device)


def forget_tables() -> None:
    """Decide by the measured tables as they are on disk now: for after one was written.

    A model that has run already goes on as it did, until something else about its calls changes.
    """
    tables.forget()
    for cache in (_has_measured_networks, network_path, layer_path):
        cache.cache_clear()


@contextlib.contextmanager
def decided_by(table: table_files.Table) -> Iterator[None]:
    """Within the block, decide by a table before those on disk."""
    with tables.asked_first(table):
        forget_tables()
        yield
    forget_tables()


def _why_call_cannot(x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, backend: Backend) -> str | None:
    if is_tracing():
        return "the call is being traced by torch.jit"
    if is_exporting_to_onnx():
        return "the call is being exported to ONNX"
    if x.is_nested:
        return "the input is a nested tensor"
    if not torch.compiler.is_compiling() and is_zero_tensor(x):
        return "the input stands for zeros and has no memory (x.clone() gives it some)"
    reason = why_device(x.device, backend)
    if reason is not None:
        return reason
    if is_transformed():
        return "a torch.func transform is active"
    if forward_mode_level() >= 0:
        return "forward-mode differentiation is active"
    if x.layout != torch.strided:
        return f"the input's layout is {x.layout}; the kernels need a dense tensor (x.to_dense())"
    if not _is_plain(x):
        return f"the input is of the subclass {type(x).__name__}"
    return _why_layers(layers, dtype, x.device)


def _is_plain(tensor: Tensor) -> bool:
    """True if a tensor is torch's own; while a compiler or a mode watches, one of those that stand in for them."""
    kind = type(tensor)
    return kind in (Tensor, nn.Parameter) or (is_watched() and kind.__name__ in STAND_INS)


STAND_INS = ("FakeTensor", "FunctionalTensor")


def why_device(device: torch.device, backend: Backend) -> str | None:
    """The reason for which no kernel runs there; None where kernels do."""
    if device.type != "cpu":
        return _why_device_cannot(device.type, device.index or 0)
    if (DEFAULT_BACKEND if backend == "auto" else backend) != "triton":
        return "the input is on the CPU"
    if WHY_NO_TRITON is not None:
        return WHY_NO_TRITON
    if not INTERPRETER:
        return (
            "the input is on the CPU, where kernels run only in Triton's interpreter; set TRITON_INTERPRET=1 "
            "before importing mlp_fused, or move the model and its input to a GPU"
        )
    return None


def _why_layers(layers: Sequence[Layer], dtype: torch.dtype, device: torch.device) -> str | None:
    interpreted = device.type == "cpu"  # the interpreter computes in float64 as well
    if dtype not in DTYPES.values() and not (interpreted and dtype == torch.float64):
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
    parameters: tuple[Parameters, ...] = (),
) -> NetworkPath | str:
    """The network path for these layers, or the reason why they take the layer path.

    The rule for training: where one pass over a tile fits in registers (`network_tiles.network_tile`), the backward
    recomputes, as storing moves two more tensors of each hidden layer, or five where not even one pass over what is
    stored fits (written; read for dz and for dW; dz written and read). A measured table overrules it, and the user
    overrules both. The choice does not depend on the rows of a batch, so that batches of every size take one path: it
    is that of the largest batch measured.

    Args:
        widths: of the input to the output.
        strides: of each layer: the weight's two and the bias's.
        recompute: the user's wish: True keeps x alone, False keeps a tensor of each hidden layer, None leaves it open.
        input_size: bytes of an element of the input, where it is wider than `dtype`'s (under autocast).
        drops: whether Dropout that drops follows a layer.
        torch_too: whether the network is left to the layer path, which may run torch's products, where that is faster.
        parameters: how they lie in memory; each has a path of its own, with its schedules.
    """
    if DEBUG:
        return "MLP_FUSED_DEBUG=1 checks layer by layer"
    if drops:
        return "Dropout is fused layer by layer"
    multiplied = network_tiles.network_precision(widths, dtype, precision, device)
    network = network_of(widths, strides, activations, dtype, multiplied)

    def problem(kind: network_tiles.NetworkKind, stores: bool = False) -> network_tiles.NetworkProblem:
        return network_tiles.NetworkProblem(kind, network.pads, network.keeps_z, dtype, multiplied, input_size, stores)

    def tile(kind: network_tiles.NetworkKind, stores: bool = False) -> TileConfig | str:
        return network_tiles.network_tile(problem(kind, stores), device)

    forward, storing = tile("forward"), tile("forward", stores=True)
    if isinstance(forward, str) or isinstance(storing, str):
        return str(storing)
    wgrad = network_tiles.network_wgrad_tile(dtype, multiplied, device)
    measured = None
    if recompute is None:
        measured = _measured_path(widths, activations, dtype, precision, training, device)
    if measured == "layer":
        return f"it is {AS_MEASURED}"
    fast = dtype != torch.float32 or network_tiles.is_fp32_measured(network.pads, multiplied, training, device)
    if torch_too and recompute is None and measured is None and not fast:
        return SLOW_NETWORK
    if not training:
        return NetworkPath(network, forward, None, "inference keeps nothing", None, wgrad)

    one_pass, chain, stored = tile("recompute"), tile("dgrad"), tile("stored")
    groups: tuple[tuple[int, int], ...] = ()
    if not isinstance(stored, str) and (not torch_too or device.arch in network_tiles.STORED_MEASURED):
        groups, chain = network_tiles.layer_groups(problem("stored"), stored), stored
    size = dtype.itemsize
    ends = 2 * widths[0] + 2 * widths[-1]
    moved = f"{size * ends} bytes a row, storing {size * (ends + (2 if groups else 5) * sum(widths[1:-1]))}"
    if not isinstance(one_pass, str) and recompute is not False and (recompute or measured != "stored"):
        reason = "the user asks for it" if recompute else f"one pass fits in registers and moves {moved}"
        return NetworkPath(network, forward, "recompute", reason, one_pass, wgrad)
    if isinstance(chain, str):
        return f"its backward does not fit: {chain}"
    if recompute:
        return NetworkPath(network, storing, "replay", "the user asks for it", chain, wgrad, groups)
    if recompute is False:
        reason = "the user asks for it"
    else:
        reason = one_pass if isinstance(one_pass, str) else f"it is {AS_MEASURED}"
    return NetworkPath(network, storing, "stored", reason, chain, wgrad, groups)


def find_path(
    x: Tensor,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    recompute: bool | None,
    backend: Backend,
    precision: str | None = None,
    training: bool | None = None,
) -> NetworkPath | LayerPath:
    """The path that these layers take; `precision` and `training` are torch's setting and state unless given."""
    path = find_network(x, layers, dtype, recompute, precision, training, leaves_to_torch(backend))
    return path if isinstance(path, NetworkPath) else find_layers(x, layers, dtype, backend, precision)


def leaves_to_torch(backend: Backend) -> bool:
    """True if torch runs the products that it is expected to run faster: unless the user asks for kernels."""
    return (DEFAULT_BACKEND if backend == "auto" else backend) != "triton"


def find_layers(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, backend: Backend, precision: str | None = None
) -> LayerPath:
    """The layer path for these layers; with the backend "triton" no product of it is torch's."""
    return layer_path(
        _widths(x, layers),
        tuple(layer.activation for layer in layers),
        parameters_of(layers),
        dtype,
        precision or precision_of(dtype),
        leaves_to_torch(backend),
        tuple(layer.dropout for layer in layers),
    )


def find_network(
    x: Tensor,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    recompute: bool | None = None,
    precision: str | None = None,
    training: bool | None = None,
    torch_too: bool = False,
) -> NetworkPath | str:
    """The network path for these layers, or the reason why they take the layer path.

    With `torch_too`, they take it only where it is expected to be faster than torch.
    """
    if training is None:
        training = wants_gradients(x, layers)
    parameters = parameters_of(layers)
    strides = tuple((*each.weight_stride, each.bias_stride) for each in parameters)
    widths = _widths(x, layers)
    activations = tuple(layer.activation for layer in layers)
    wide = x.dtype.itemsize if x.dtype.itemsize > dtype.itemsize else 0
    device = devices.device_of(x)
    precision = precision or precision_of(dtype)
    drops = any(layer.dropout for layer in layers)
    return network_path(
        widths, strides, activations, dtype, precision, device, training, recompute, wide, drops, torch_too, parameters
    )


def _widths(x: Tensor, layers: Sequence[Layer]) -> tuple[int, ...]:
    """The widths from the input to the output; never symbolic, as the path depends on them."""
    return (int(x.shape[1]), *(int(weight.shape[0]) for weight, *_ in layers))


def precision_of(dtype: torch.dtype) -> str:
    """The precision of products in a dtype: torch's setting, which is about fp32 alone."""
    return float32_precision() if dtype == torch.float32 else "ieee"
