"""Decide which path a call takes, and why."""

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
from ..kernels.dropout import layer_dropouts
from ..kernels.language import INTERPRETER, WHY_NO_TRITON
from ..kernels.network import make_network
from ..kernels.tile_config import TileConfig
from . import table_files, tables
from .layer_path import LayerPath, layer_path
from .layer_steps import Parameters, describe_parameters
from .network_path import Formulation, NetworkPath
from .settings import (
    DEBUG,
    DEFAULT_BACKEND,
    FLOAT32,
    Backend,
    constant_to_compilers,
    float32_precision,
    forward_mode_level,
    is_exporting_to_onnx,
    is_intercepted,
    is_tracing,
    is_transformed,
    is_zero_tensor,
)

if TYPE_CHECKING:
    from ..reference import Layer


logger = logging.getLogger("mlp_fused")

AS_MEASURED = "faster as measured on this device"
TORCH_IS_FASTER = f"torch is {AS_MEASURED}"
UNMEASURED_FLOAT32 = "one kernel for such a float32 network was not measured to be faster than torch"
UNMEASURED_DROPOUT = 'one kernel for a network with Dropout was not measured; backend="triton" uses one all the same'
OLDEST_CAPABILITY = 80  # 8.0 is the oldest compute capability that the kernels are compiled and tested for


def _why_device_cannot(kind: str, index: int) -> str | None:
    return _cached_why_device_cannot(kind, index)


constant_to_compilers(_why_device_cannot)  # otherwise compilers trace through the cache and into the driver


@functools.lru_cache(maxsize=64)
def _cached_why_device_cannot(kind: str, index: int) -> str | None:
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
    """The reason why these layers run as plain torch; None if the kernels run them.

    Args:
        x: the input, already checked.
        dtype: the dtype of the products (autocast's, if that is on).
        backend: the user's choice; "auto" means MLP_FUSED_BACKEND if that is set.
        recompute: the user's choice.
        changed: the reason why the functions that the kernels replace are not torch's own; None if they are.

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
            dtype_precision(dtype),
            wants_gradients(x, layers),
        )
    if reason is not None:
        if backend == "triton":
            raise RuntimeError(f'backend is "triton", but {reason}; backend="auto" runs plain torch')
        if x.is_cuda and not torch.compiler.is_compiling():
            log_once(reason)
    return reason


def why_not(
    layers: Sequence[Layer], dtype: torch.dtype, device: torch.device, backend: Backend, planned: bool
) -> str | None:
    """The reason why layers would not run on kernels, as far as it can be known without an input; or None.

    `planned` is True if the device is only described, and need not exist on this machine.
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


def _why_torch_here(
    kind: str,
    index: int,
    widths: tuple[int, ...],
    activations: tuple[str, ...],
    dtype: torch.dtype,
    precision: str,
    training: bool,
) -> str | None:
    """The reason to run plain torch although the kernels could run: torch was measured to be faster. None otherwise.

    All arguments are values that a compiler can treat as constants.
    """
    if not _has_measured_networks(kind, index):
        return None
    path = measured_path(
        widths, tuple(map(parse, activations)), dtype, precision, training, devices.describe(kind, index)
    )
    return TORCH_IS_FASTER if path == "torch" else None


constant_to_compilers(_why_torch_here)


@functools.lru_cache(maxsize=64)
def _has_measured_networks(kind: str, index: int) -> bool:
    """True if a device's tables have any networks. If not, every call saves the microseconds of a look-up."""
    return any(table.networks for table in tables.measured(devices.describe(kind, index)))


def measured_path(
    widths: tuple[int, ...],
    activations: Sequence[Activation],
    dtype: torch.dtype,
    precision: str,
    training: bool,
    device: devices.Device,
    outdated: bool = False,
) -> str | None:
    """The path that was measured to be fastest; None if none was, or if hidden layers have different activations.

    It is used if the user chose neither the backend nor `recompute`. It does not depend on the batch size (see
    `network_path`). With `outdated`, it is the path that would be used if its kernels had not changed.
    """
    names = {activation.name for activation in activations[:-1] or activations}
    if len(names) > 1:
        return None
    return tables.path_for(widths, dtype, precision, names.pop(), training, device, outdated)


def forget_tables() -> None:
    """Read the measured tables from disk again, after one was written.

    A model that has already run continues as before, until something else about its calls changes.
    """
    tables.forget()
    for cache in (_has_measured_networks, network_path, layer_path):
        cache.cache_clear()


@contextlib.contextmanager
def decided_by(table: table_files.Table) -> Iterator[None]:
    """Within the block, this table takes precedence over those on disk."""
    try:
        with tables.preferred(table):
            forget_tables()
            yield
    finally:
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
    """True if a tensor is no subclass. Under a compiler or a dispatch mode, torch's stand-ins count as plain too."""
    kind = type(tensor)
    return kind in (Tensor, nn.Parameter) or (is_intercepted() and kind.__name__ in STAND_INS)


STAND_INS = ("FakeTensor", "FunctionalTensor")


def why_device(device: torch.device, backend: Backend) -> str | None:
    """The reason why no kernel runs on a device; None if kernels do."""
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
            continue  # the operator resolves lazy negation itself
        if weight.is_neg() or (bias is not None and bias.is_neg()):
            return "a parameter is negated lazily (resolve_neg() makes it plain)"
    return None


@functools.cache
def log_once(reason: str) -> None:
    """Log the reason why plain torch runs, once for each reason."""
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
    dropouts: tuple[float, ...] = (),
    torch_too: bool = False,
    parameters: tuple[Parameters, ...] = (),
    splits: tuple[str, ...] | None = None,
) -> NetworkPath | str:
    """The network path for these layers, or the reason why they take the layer path.

    The rule for training: if one pass over a tile fits in registers (`network_tiles.network_tile`), the backward
    recomputes the hidden layers. Storing them moves two more tensors for each hidden layer: the saved tensor is written
    and read. It moves five if one pass over the stored tensors does not fit either: the saved tensor is written, read
    for dz and read for dW; dz is written and read.

    A measured table overrules this rule, and the user overrules both. The choice does not depend on the batch size, so
    that batches of every size take the same path. A table decides by the largest batch that was measured.

    Args:
        widths: the widths from the input to the output.
        strides: for each layer, the weight's two strides and the bias's.
        recompute: the user's choice: True saves only x, False saves a tensor for each hidden layer, None is no choice.
        input_size: bytes of an element of the input, if it has more than `dtype` (under autocast).
        dropouts: for each layer, the probability of its Dropout; 0 if it has none. By default, no layer has Dropout.
        torch_too: True to take the layer path, which may run torch's products, where it is expected to be faster.
        parameters: the dtypes and strides of the parameters. Others get another path, with its own schedules.
        splits: the allowed ways to split fp32 into 16-bit parts, as `network_tiles.network_precision` takes them. By
            default, the environment variable MLP_FUSED_FP32 decides.
    """
    if DEBUG:
        return "MLP_FUSED_DEBUG=1 checks layer by layer"
    if splits is None and FLOAT32 == "ieee":
        splits = ("bf16x6",)
    multiplied = network_tiles.network_precision(widths, dtype, precision, device, splits)
    rounds_with_relu = network_tiles.rounds_with_relu(dtype, device)
    network = make_network(
        widths, strides, activations, dtype, multiplied, tuple(map(bool, dropouts)), rounds_with_relu
    )
    drops = layer_dropouts(dropouts)

    def problem(kind: network_tiles.NetworkKind, stores: bool = False) -> network_tiles.NetworkProblem:
        return network_tiles.NetworkProblem(
            kind, network.pads, network.saves_z, dtype, multiplied, input_size, stores, any(dropouts)
        )

    def tile(kind: network_tiles.NetworkKind, stores: bool = False) -> TileConfig | str:
        return network_tiles.network_tile(problem(kind, stores), device)

    forward, storing_forward = tile("forward"), tile("forward", stores=True)
    if isinstance(forward, str) or isinstance(storing_forward, str):
        return str(storing_forward)
    if any(dropouts) and torch_too and not network_tiles.is_dropout_measured(network.pads, dtype, device):
        return UNMEASURED_DROPOUT
    rebuilds = any(saves_z and drops for saves_z, drops in zip(network.saves_z[:-1], network.drops))
    wgrad = network_tiles.network_wgrad_tile(dtype, multiplied, device, rebuilds)
    measured = None
    if recompute is None:
        measured = measured_path(widths, activations, dtype, precision, training, device)
    if measured == "layer":
        return f"it is {AS_MEASURED}"
    fast = dtype != torch.float32 or network_tiles.is_fp32_measured(network.pads, multiplied, training, device)
    if torch_too and recompute is None and measured is None and not fast:
        return UNMEASURED_FLOAT32
    if not training:
        return NetworkPath(network, forward, None, "inference saves nothing", None, wgrad, (), drops)

    recomputing_backward, backward, stored_backward = tile("recompute"), tile("dgrad"), tile("stored")
    groups: tuple[tuple[int, int], ...] = ()
    if not isinstance(stored_backward, str) and (not torch_too or device.arch in network_tiles.STORED_MEASURED):
        groups, backward = network_tiles.layer_groups(problem("stored"), stored_backward), stored_backward
    size = dtype.itemsize
    ends = 2 * widths[0] + 2 * widths[-1]
    moved = f"{size * ends} bytes a row; storing would move {size * (ends + (2 if groups else 5) * sum(widths[1:-1]))}"
    reason = "the user asks for it"
    if not isinstance(recomputing_backward, str) and recompute is not False and (recompute or measured != "stored"):
        if recompute is None:
            reason = f"one pass fits in registers and moves {moved}"
        return NetworkPath(network, forward, "recompute", reason, recomputing_backward, wgrad, (), drops)
    if isinstance(backward, str):
        return f"its backward does not fit: {backward}"
    if recompute is None:
        reason = recomputing_backward if isinstance(recomputing_backward, str) else f"it is {AS_MEASURED}"
    formulation: Formulation = "rerun" if recompute else "stored"
    return NetworkPath(network, storing_forward, formulation, reason, backward, wgrad, groups, drops)


def find_path(
    x: Tensor,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    recompute: bool | None,
    backend: Backend,
    precision: str | None = None,
    training: bool | None = None,
) -> NetworkPath | LayerPath:
    """The path of these layers. By default, `precision` and `training` are taken from torch's present state."""
    path = find_network(x, layers, dtype, recompute, precision, training, leaves_to_torch(backend))
    return path if isinstance(path, NetworkPath) else find_layers(x, layers, dtype, backend, precision)


def leaves_to_torch(backend: Backend) -> bool:
    """True if torch may run the products that it is expected to run faster: the backend is not "triton"."""
    return (DEFAULT_BACKEND if backend == "auto" else backend) != "triton"


def find_layers(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, backend: Backend, precision: str | None = None
) -> LayerPath:
    """The layer path for these layers. With the backend "triton", it leaves no product to torch."""
    return layer_path(
        layer_widths(x, layers),
        tuple(layer.activation for layer in layers),
        describe_parameters(layers),
        dtype,
        precision or dtype_precision(dtype),
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
    device: devices.Device | None = None,
) -> NetworkPath | str:
    """The network path for these layers, or the reason why they take the layer path.

    With `torch_too`, they take the network path only if it is expected to be faster than torch. By default, `device` is
    the input's.
    """
    if training is None:
        training = wants_gradients(x, layers)
    parameters = describe_parameters(layers)
    strides = tuple((*layer.weight_stride, layer.bias_stride) for layer in parameters)
    widths = layer_widths(x, layers)
    activations = tuple(layer.activation for layer in layers)
    input_size = x.dtype.itemsize if x.dtype.itemsize > dtype.itemsize else 0
    device = device or devices.device_record(x)
    precision = precision or dtype_precision(dtype)
    dropouts = tuple(layer.dropout for layer in layers) if any(layer.dropout for layer in layers) else ()
    choice = (device, training, recompute, input_size, dropouts, torch_too, parameters)
    return network_path(widths, strides, activations, dtype, precision, *choice)


def layer_widths(x: Tensor, layers: Sequence[Layer]) -> tuple[int, ...]:
    """The widths from the input to the output, as plain integers, because the path depends on them."""
    return (int(x.shape[1]), *(int(weight.shape[0]) for weight, *_ in layers))


def dtype_precision(dtype: torch.dtype) -> str:
    """The precision of products in a dtype: torch's setting for fp32, "ieee" for others."""
    return float32_precision() if dtype == torch.float32 else "ieee"
