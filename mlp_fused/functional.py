"""linear_act and mlp: checks, and which path runs, decided once for calls that repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from . import reference
from .engine.layer_path import LayerPath, layer_path
from .engine.network_path import run_network
from .engine.originals import LINEAR, why_mode, why_replaced
from .engine.paths import (
    DEFAULT_BACKEND,
    Backend,
    NetworkPlan,
    check_backend,
    check_recompute,
    compute_dtype,
    float32_precision,
    is_watched,
    network_path,
    wants_gradients,
    why_reference,
)
from .engine.recognize import resolve
from .engine.schedule import run_layers
from .kernels import devices
from .kernels.activation import Activation
from .kernels.dropout import draw_seed

try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards

    TensorGuards: Any = _TensorGuards
except ImportError:  # it is no public name; without it, every call decides anew
    TensorGuards = None

__all__ = ["Layer", "linear_act", "mlp"]

HALVES = (torch.float16, torch.bfloat16)


class Layer(NamedTuple):
    """h = a(x Wᵀ + b): weight (N, K), bias (N,) or None; then Dropout, by its probability."""

    weight: Tensor
    bias: Tensor | None
    activation: Activation
    dropout: float = 0.0


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | Activation | nn.Module | type[nn.Module] | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """h = a(x Wᵀ + b): a linear layer with its activation.

    Args:
        x: (..., K), any strides, rows included that are none.
        weight: (N, K).
        bias: (N,), or None.
        activation: a name of `ACTIVATIONS`, an `nn.Module` class or instance; None is the identity.
        backend: "auto", "triton" (an error where the kernels cannot run) or "reference" (plain torch).

    Returns:
        (..., N), of x's dtype (autocast's where it is on).

    Raises:
        TypeError: x, weight or bias is not a tensor, or `activation` is none of the above.
        ValueError: an unknown activation or backend.
        RuntimeError: shapes, dtypes or devices that do not fit together; backend="triton" where it cannot run.
    """
    return _mlp(x, (Layer(weight, bias, resolve(activation)),), backend)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    activation: str | Activation | nn.Module | type[nn.Module] | None = "relu",
    output_activation: str | Activation | nn.Module | type[nn.Module] | None = None,
    *,
    backend: Backend = "auto",
    recompute: bool | None = None,
) -> Tensor:
    """H_l = a_l(H_{l-1} W_lᵀ + b_l), H_0 = x: a whole network; returns the last H.

    Args:
        x: (..., d_0).
        weights: of each layer, (d_l, d_{l-1}).
        biases: of each layer, (d_l,) or None; None for none at all.
        activation: after every layer but the last, as in `linear_act`.
        output_activation: after the last layer.
        backend: as in `linear_act`.
        recompute: what is kept for backward. True: x alone, hidden layers are computed again. False: one tensor of each
            layer. None: whatever is faster.

    Raises:
        As `linear_act`; and ValueError where there is no layer, or not one bias a layer; TypeError for another
        `recompute`.
    """
    if len(weights) == 0:
        raise ValueError("weights is empty; it needs one weight for each layer")
    biases = [None] * len(weights) if biases is None else biases
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries; it needs one for each of the {len(weights)} weights")
    hidden, last = resolve(activation), resolve(output_activation, "output_activation")
    activations = [hidden] * (len(weights) - 1) + [last]
    return _mlp(x, tuple(map(Layer, weights, biases, activations)), backend, recompute)


def _mlp(x: Tensor, layers: Sequence[Layer], backend: Backend, recompute: bool | None = None) -> Tensor:
    check_backend(backend)
    check_recompute(recompute)
    dtype = check_call(x, layers)
    if why_reference(x, layers, dtype, backend, recompute, _why_changed(layers)) is None:
        return run_kernels(x, layers, dtype, recompute, backend)
    weights, biases, activations, _ = zip(*layers)
    if recompute and can_checkpoint():
        return checkpoint(reference.mlp, x, weights, biases, activations, use_reentrant=False)
    return reference.mlp(x, weights, biases, activations)


def _why_changed(layers: Sequence[Layer]) -> str | None:
    """The reason why a function that these layers call is not torch's own; None where all are."""
    reason = why_mode()
    for layer in layers:
        reason = reason or why_replaced((LINEAR,), layer.activation.name)
    return reason


def check_call(x: Tensor, layers: Sequence[Layer]) -> torch.dtype:
    """The dtype that the products are computed in: x's, or autocast's where it is on.

    Raises:
        TypeError: something is not a tensor.
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input is {type(x).__name__}; it needs to be a torch.Tensor; convert it with torch.as_tensor")
    device = x.device
    dtype = compute_dtype(x.dtype, device.type)
    # Autocast brings floating-point dtypes together; it shows in the dtype, or in x being of autocast's already.
    mixed = dtype != x.dtype or (dtype in HALVES and torch.is_autocast_enabled(device.type))
    width = x.shape[-1] if x.dim() else None
    for index, (weight, bias, *_) in enumerate(layers):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None and name == "bias":
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} {index} is {type(tensor).__name__}; it needs to be a torch.Tensor")
            if tensor.device != device:
                raise RuntimeError(
                    f"input is on {device}, the model's parameters on {tensor.device}; "
                    f"move it with x.to({str(tensor.device)!r})"
                    if index == 0
                    else f"{name} {index} is on {tensor.device}, the input on {device}; "
                    f"move the whole model with model.to({str(device)!r})"
                )
            if tensor.dtype != x.dtype and not (mixed and tensor.dtype.is_floating_point):
                raise RuntimeError(
                    f"input is {x.dtype}, the model's {name} {index} {tensor.dtype}; "
                    f"convert it with x.to({tensor.dtype}), or compute in a lower precision under torch.autocast"
                )
        if weight.dim() != 2:
            raise RuntimeError(f"weight {index} has shape {tuple(weight.shape)}; it needs to be (width out, width in)")
        if weight.shape[1] != width:
            found = (
                f"input has shape {tuple(x.shape)}; its last dimension needs to be {weight.shape[1]}"
                if index == 0
                else f"layer {index} takes {weight.shape[1]} features, layer {index - 1} gives {width}"
            )
            raise RuntimeError(f"{found}, the width of weight {index} {tuple(weight.shape)}")
        width = weight.shape[0]
        if bias is not None and bias.shape != (width,):
            raise RuntimeError(f"bias {index} has shape {tuple(bias.shape)}; it needs to be ({width},)")
    if not dtype.is_floating_point:
        raise RuntimeError(f"input is {dtype}; it needs to be a real floating-point dtype; convert it with x.float()")
    return dtype


def can_checkpoint() -> bool:
    """Whether there is something to keep, and torch.utils.checkpoint works: under torch.func transforms it does not."""
    return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


def run_kernels(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, recompute: bool | None, backend: Backend
) -> Tensor:
    """x (..., K) through kernels that compute in `dtype`, with gradients wherever they are wanted."""
    if is_watched():
        return run_operator(x, layers, dtype, recompute, backend)
    shape = x.shape
    if x.is_neg():  # a view that negates lazily; kernels read memory as it lies
        x = x.resolve_neg()
    if len(shape) != 2:
        x = x.reshape(-1, shape[-1])
    weights, biases, *_ = zip(*layers)
    path = find_path(x, layers, dtype, recompute, backend)
    if recompute and isinstance(path, LayerPath) and can_checkpoint():
        # The seed is drawn outside, because the checkpointed function runs twice and has to drop the same elements.
        # It draws nothing else, so no generator has to be put back, which torch 2.9 cannot do within a graph's capture.
        seed = draw_seed(x.device) if path.drops else None
        y = checkpoint(run_layers, x, weights, biases, path, seed, use_reentrant=False, preserve_rng_state=False)
    else:
        y = run_path(x, weights, biases, path)
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])


def run_operator(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, recompute: bool | None, backend: Backend
) -> Tensor:
    """The same by a registered operator (ops.py), which is what a compiler or a dispatch mode sees."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y, _ = torch.ops.mlp_fused.mlp(
        rows,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers if layer.bias is not None],
        [layer.bias is not None for layer in layers],
        [layer.activation.spec for layer in layers],
        dtype,
        precision_of(dtype),
        recompute,
        backend,
        wants_gradients(x, layers),
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def run_path(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], path: NetworkPlan | LayerPath
) -> Tensor:
    """x (M, d_0) -> y (M, d_L)."""
    if isinstance(path, LayerPath):
        return run_layers(x, weights, biases, path)
    return run_network(x, tuple(weights), tuple(biases), path)


class Decision:
    """The path that a call took; later calls that it holds for take it without deciding again.

    Whether it holds is asked of torch.compile's guards, which compare every tensor's type, dtype, device, sizes,
    strides, requires_grad and dispatch keys (inference mode, lazy negation …) in C++: a tenth of the time of deciding.
    """

    def __init__(
        self,
        x: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        settings: tuple[object, ...],
        path: NetworkPlan | LayerPath,
    ) -> None:
        self.path = path
        self.settings = settings
        self.biased = [bias is not None for bias in biases]
        self.all_biased = all(self.biased)
        parameters = [*weights, *(bias for bias in biases if bias is not None)]
        self.guards = TensorGuards(
            x,
            *parameters,
            dynamic_dims_sizes=[[None, x.shape[1]], *(list(each.shape) for each in parameters)],
            dynamic_dims_strides=[[None, None], *(list(each.stride()) for each in parameters)],
        )

    @staticmethod
    def can_hold(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
        """Whether such a call can be remembered: guards refuse a tensor that stands twice."""
        return TensorGuards is not None and not x.is_neg() and len(set(map(id, weights))) == len(weights)

    def holds(
        self, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], settings: tuple[object, ...]
    ) -> bool:
        """Whether a call with these would decide the same."""
        if settings != self.settings:
            return False
        if not self.all_biased:
            if [bias is not None for bias in biases] != self.biased:
                return False
            biases = tuple(bias for bias in biases if bias is not None)
        return self.guards.check(x, *weights, *biases)  # not where a bias has become None


def settings(kind: str, backend: Backend, recompute: bool | None) -> tuple[object, ...]:
    """All that a path is decided by besides what `Decision` compares of tensors."""
    return (
        backend,
        recompute,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.is_grad_enabled(),
        float32_precision(),
        torch._C._are_functorch_transforms_active(),
        forward_ad._current_level,
        torch._C._get_tracing_state(),
        torch._C._len_torch_dispatch_stack(),
    )


def find_path(
    x: Tensor,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    recompute: bool | None,
    backend: Backend,
    precision: str | None = None,
    training: bool | None = None,
) -> NetworkPlan | LayerPath:
    """The path that these layers take; `precision` and `training` are torch's setting and state unless given."""
    path = find_network(x, layers, dtype, recompute, precision, training, leaves_to_torch(backend))
    return path if isinstance(path, NetworkPlan) else find_layers(x, layers, dtype, backend, precision)


def find_layers(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, backend: Backend, precision: str | None = None
) -> LayerPath:
    """The layer path for these layers; with the backend "triton" no product of it is torch's."""
    return layer_path(
        _widths(x, layers),
        tuple(layer.activation for layer in layers),
        tuple((weight.dtype, None if bias is None else bias.dtype) for weight, bias, *_ in layers),
        dtype,
        precision or precision_of(dtype),
        leaves_to_torch(backend),
        tuple(layer.dropout for layer in layers),
    )


def leaves_to_torch(backend: Backend) -> bool:
    """True if torch runs the products that it is expected to run faster: unless the user asks for kernels."""
    return (DEFAULT_BACKEND if backend == "auto" else backend) != "triton"


def find_network(
    x: Tensor,
    layers: Sequence[Layer],
    dtype: torch.dtype,
    recompute: bool | None = None,
    precision: str | None = None,
    training: bool | None = None,
    torch_too: bool = False,
) -> NetworkPlan | str:
    """The network path for these layers, or the reason why they take the layer path.

    With `torch_too`, they take it only where it is expected to be faster than torch.
    """
    if training is None:
        training = wants_gradients(x, layers)
    strides = tuple(
        (*map(int, weight.stride()), 0 if bias is None else int(bias.stride(0))) for weight, bias, *_ in layers
    )
    widths = _widths(x, layers)
    activations = tuple(layer.activation for layer in layers)
    wide = x.dtype.itemsize if x.dtype.itemsize > dtype.itemsize else 0
    device = devices.device_of(x)
    precision = precision or precision_of(dtype)
    drops = any(layer.dropout for layer in layers)
    return network_path(
        widths, strides, activations, dtype, precision, device, training, recompute, wide, drops, torch_too
    )


def _widths(x: Tensor, layers: Sequence[Layer]) -> tuple[int, ...]:
    """Of the input to the output; never symbolic, as the path depends on them."""
    return (int(x.shape[1]), *(int(weight.shape[0]) for weight, *_ in layers))


def precision_of(dtype: torch.dtype) -> str:
    """How products in a dtype are multiplied: torch's setting, which is of fp32 alone."""
    return float32_precision() if dtype == torch.float32 else "ieee"
